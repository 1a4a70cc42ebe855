"""Scoring at scale for `itm evaluate`: where the pairs of a split are scored, and which of them.

The default scores all pairs in one matrix in this process. Past `DENSE_BYTES` of scores or `IN_PROCESS_PAIRS` costly pairs, or with
--distributed, tiles are scored by Ray tasks into the store <output>/<name>/scores-<hash>; a run that was stopped computes only the tiles
that are missing, and metrics are streamed from the tiles. On several machines <output> must be a folder or URI that all of them see.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from itm.evaluation.dataset import EncodedSplit
from itm.evaluation.metrics import Scores
from itm.evaluation.scoring import PRECISIONS, score_matrix
from itm.evaluation.streamed import TiledScores
from itm.evaluation.tiles import Grid, Spread, TileStore, fill, score_tile
from itm.models.uarda_pruned import Prune, Pruning

# Above this many bytes the matrix is not held; above this many pairs, attention or joint forwards are worth tasks that can be resumed.
DENSE_BYTES = 4 << 30
IN_PROCESS_PAIRS = 50_000_000


@dataclass(frozen=True)
class How:
    """The choices of `itm evaluate` about scoring. block: images per score tile, unset = from the memory budget."""

    precision: str = "fp32"
    block: int | None = None
    distributed: bool = False
    prune: Prune = "off"

    @classmethod
    def of(cls, args: argparse.Namespace) -> How:
        return cls(precision=args.precision, distributed=args.distributed, prune=args.prune)


IN_MEMORY = How()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="fp32 is the score of record")
    parser.add_argument("--distributed", action="store_true", help="score by Ray tasks into a store of tiles, also when the split is small")
    parser.add_argument(
        "--prune", choices=get_args(Prune), default="off", help="UARDA: leave out fragments below the threshold; same scores"
    )


def score_split(members: Sequence[Any], encoded: Sequence[EncodedSplit], how: How, root: str, identity: dict[str, Any]) -> Scores:
    """Scores (I,T), the mean over the members; `encoded` holds the split as each member sees it.

    root: where stores lie. identity: what the scores depend on besides `how`, for the store.
    """
    _set_pruning(members, how.prune)
    sides = [(split.images, split.captions) for split in encoded]
    pairs = len(sides[0][0]) * len(sides[0][1])
    costly = any(images.parts is not None for images, _ in sides)
    options: dict[str, Any] = {"precision": how.precision, "block": how.block}
    if not (how.distributed or 4 * pairs > DENSE_BYTES or (costly and pairs > IN_PROCESS_PAIRS)):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return score_matrix(list(members), [i for i, _ in sides], [c for _, c in sides], device=device, **options)
    spread, put, options["device"] = by_tasks()
    # Captions lie in the order of the lengths that one member sees; the others are cut to the longest of each tile all the same.
    images, captions = next((side for side in sides if side[1].mask is not None), sides[0])
    identity = {**identity, **options, "prune": how.prune, "torch": torch.__version__}
    store = TileStore.create(root, identity, Grid.of(members, images, captions, how.block), captions)
    names = encoded[0].names.image_keys, encoded[0].names.caption_ids
    fill(store, [member.cpu() for member in members], sides, names, spread, put, options)
    return TiledScores(store, spread)


def notes(members: Sequence[Any]) -> dict[str, Any]:
    """What the result says besides its numbers: the pruned share, the engine and the shares of time of members that prune."""
    reports = [member.pruning.report() for member in members if getattr(member, "pruning", None) is not None]
    return {"pruning": reports} if reports else {}


def _set_pruning(members: Sequence[Any], prune: Prune) -> None:
    able = [member for member in members if hasattr(member, "pruning")]
    if prune != "off" and not able:
        kinds = ", ".join(type(member).__name__ for member in members)
        raise ValueError(f"--prune {prune} needs a UARDA matcher, which has a threshold to prune by; this is {kinds}: leave --prune out")
    for member in able:
        member.pruning = None if prune == "off" else Pruning(prune)


def by_tasks() -> tuple[Spread, Callable[[Any], Any], str]:
    """`spread` and `put` by Ray, and the device of scoring: tasks of one CPU thread, or of one GPU each where the cluster has them."""
    import ray

    from pipelines.session import connect

    connect()
    resources = ray.cluster_resources()
    device = "cuda" if resources.get("GPU", 0) > 0 else "cpu"
    window = 2 * max(1, int(resources.get("CPU", 1)))

    def spread(work: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        task = ray.remote(num_cpus=1, num_gpus=1 if work is score_tile and device == "cuda" else 0)(work)
        running: deque[Any] = deque()
        for job in jobs:
            running.append(task.remote(*job))
            if len(running) >= window:
                yield ray.get(running.popleft())
        while running:
            yield ray.get(running.popleft())

    return spread, ray.put, device
