"""Scoring at scale for `itm evaluate`: where the pairs of a split are scored, and which of them.

The default scores all pairs in one matrix in this process. Past `DENSE_BYTES` of scores or `IN_PROCESS_PAIRS` costly pairs, or with
--distributed, tiles are scored by Ray actors into the store <output>/<name>/scores-<hash>; a run that was stopped computes only the tiles
that are missing, and metrics are streamed from the tiles. On several machines <output> must be a folder or URI that all of them see.
A process without a GPU whose cluster has some leaves attention and joint forwards to them, however few pairs there are.
--screen scores only what cheap vectors propose, and says what that loses.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from itm.data.formats import Json
from itm.device import resolve_device
from itm.evaluation.dataset import EncodedSplit, Names
from itm.evaluation.metrics import Scores
from itm.evaluation.scoring import score_matrix
from itm.evaluation.screen import ScreenedScores, Sides, by_cosine, choose_k, probe, screened_scores, unit_vectors
from itm.evaluation.streamed import TiledScores
from itm.evaluation.tiles import Grid, Part, Spread, TileStore, fill_parts, score_tile
from itm.matchers.late.uarda import UARDA
from itm.matchers.late.uarda_pruned import Prune, Pruning
from itm.matchers.mean import beside
from itm.training.compiled import check_compiler
from itm.types import Encoded, Matcher, Options
from pipelines.on_ray.gpus import Seats, at_gpu, fetched, gpu_seats, gpus_elsewhere
from pipelines.on_ray.options import How, threshold_of
from pipelines.on_ray.pool import Pool
from pipelines.on_ray.reach import shared

# Above this many bytes the matrix is not held; above this many pairs, attention or joint forwards are worth tasks that can be resumed.
DENSE_BYTES = 4 << 30
IN_PROCESS_PAIRS = 50_000_000


def score_split(
    members: Sequence[Matcher],
    encoded: Sequence[EncodedSplit],
    how: How,
    root: str,
    identity: Json,
    screen: EncodedSplit | None = None,
    folds: int = 1,
) -> Scores:
    """Scores (I,T), the mean over the members; `encoded` holds the split as each member sees it, `screen` as the screening matcher does.

    folds: where the matrix fits in memory, only so many blocks of images are scored, each with its own captions; the other scores are
    -inf. root: where stores lie. identity: what the scores depend on besides `how`, for the store.
    """
    if how.compile:
        check_compiler(resolve_device())
    _set_pruning(members, how.prune)
    if how.eval_threshold is not None:
        _set_threshold(members, str(how.eval_threshold))
    for member in members:
        member.fuse_tiles = how.compile
    sides = [(split.images, split.captions) for split in encoded]
    pairs = len(sides[0][0]) * len(sides[0][1]) // folds
    costly = any(images.parts is not None for images, _ in sides)
    options: Json = {"precision": how.precision, "block": how.block}
    if how.screen:
        given = (sides, how, screen or _by_mean_cosine(encoded))
        if costly and gpus_elsewhere():
            return at_gpu(_screened, [member.cpu() for member in members], *given)
        return _screened(members, *given)
    dense = 4 * pairs * folds <= DENSE_BYTES
    cut = _folds(sides, encoded[0].names, folds if dense else 1)
    if not (how.distributed or not dense or (costly and (pairs > IN_PROCESS_PAIRS or gpus_elsewhere()))):
        options["device"] = resolve_device()
        found = (score_matrix(list(members), [i for i, _ in fold.sides], [c for _, c in fold.sides], **options) for fold in cut)
        return _whole(found, cut, sides)
    stores, spread = _stored([*_folds(sides, encoded[0].names, 1), *(cut if len(cut) > 1 else [])], members, how, root, identity, options)
    scores = [TiledScores(store, spread) for store in stores]
    return scores[0] if len(scores) == 1 else _whole((tiled[:] for tiled in scores), cut, sides)


@dataclass(frozen=True)
class _Fold:
    """A block of consecutive images with the columns of their own captions; the whole split where there is one fold."""

    sides: Sides
    names: tuple[Sequence[str], Sequence[str]]
    rows: slice
    columns: Tensor


def _folds(sides: Sides, names: Names, count: int) -> list[_Fold]:
    if count == 1:
        return [_Fold(sides, (names.image_keys, names.caption_ids), slice(None), torch.arange(len(names.caption_ids)))]
    size, found = len(names.image_keys) // count, []
    for start in range(0, size * count, size):
        rows = slice(start, start + size)
        columns = ((names.caption_image >= start) & (names.caption_image < rows.stop)).nonzero()[:, 0]
        own = [(images[rows], captions[columns]) for images, captions in sides]
        found.append(_Fold(own, (names.image_keys[rows], [names.caption_ids[c] for c in columns.tolist()]), rows, columns))
    return found


def _whole(found: Iterable[Tensor], cut: Sequence[_Fold], sides: Sides) -> Tensor:
    """(I,T): the scores of the folds in their places, -inf elsewhere."""
    if len(cut) == 1:
        return next(iter(found))
    images, captions = sides[0]
    scores = torch.full((len(images), len(captions)), -torch.inf)
    for fold, own in zip(cut, found, strict=True):
        scores[fold.rows, fold.columns] = own
    return scores


def _stored(
    blocks: Sequence[_Fold], members: Sequence[Matcher], how: How, root: str, identity: Json, options: Json
) -> tuple[list[TileStore], Spread]:
    """The store of tiles of the whole split, which is the first of `blocks`, or one of each fold, which are the others; all finished.

    One of the whole that another protocol has left serves the folds too. Also returns how tiles are read by tasks.
    """
    # Captions lie in the order of the lengths that one member sees; the others are cut to the longest of each tile all the same.
    seen = [next((side for side in block.sides if side[1].mask is not None), block.sides[0]) for block in blocks]
    grids = [Grid.of(members, images, captions, how.block) for images, captions in seen]
    folds = range(1, len(blocks))
    spread, put, options["device"] = by_actors(sum(len(grids[k].tiles) for k in folds or [0]))
    identity = {**identity, **options, "compile": how.compile, "prune": how.prune, "torch": torch.__version__}
    identity |= {} if how.eval_threshold is None else {"eval_threshold": threshold_of(str(how.eval_threshold))}
    wanted = [(k, identity | {"fold": f"{k} of {len(folds)}"}) for k in folds]
    if not folds or TileStore.is_finished(root, identity, grids[0]):
        wanted = [(0, identity)]
    parts = [Part(TileStore.create(root, own, grids[k], seen[k][1]), blocks[k].sides, blocks[k].names) for k, own in wanted]
    with shared({"output": root}):
        pass  # who joins later writes a tile that the driver then misses, and says so
    fill_parts(parts, [member.cpu() for member in members], spread, put, options)
    return [part.store for part in parts], spread


def notes(members: Sequence[Matcher], scores: Scores) -> Json:
    """What the result says besides its numbers: shares and times of members that prune, candidates and loss of a screen."""
    reports = [member.pruning.report() for member in members if member.pruning is not None]
    screened = {"screen": scores.report} if isinstance(scores, ScreenedScores) else {}
    return ({"pruning": reports} if reports else {}) | screened


def described(result: Json) -> str:
    """The notes of a result, readable in a terminal; empty where there are none."""
    lines = []
    for row in result.get("pruning", []):
        share = "seen by the tasks only" if row["p"] is None else f"{row['p']:.1%} of fragments pruned"
        times = ", ".join(f"{part} {value:.0%}" for part, value in row["share_of_time"].items())
        lines.append(f"pruning: {share}; engine {row['engine']}; CPU time: {times}")
    if "screen" in result:
        screen = result["screen"]
        lines.append(f"screen: APPROXIMATE, {screen['k']} candidates a side, {screen['scored']:.2%} of the pairs scored")
        for way, row in screen["loss"].items():
            parts = (f"{at} {row[at]['lost']:.2f} % ({row[at]['low']:.2f}-{row[at]['high']:.2f})" for at in row if at != "queries")
            lines.append(f"  {way} hits lost among {row['queries']} queries (95 % interval): {', '.join(parts)}")
    return "\n".join(lines)


def _by_mean_cosine(encoded: Sequence[EncodedSplit]) -> EncodedSplit:
    """The split with vectors whose cosine is the mean over the members that have vectors; as it is of one matcher."""
    if len(encoded) == 1:
        return encoded[0]
    able = [split for split in encoded if split.images.vector is not None and split.captions.vector is not None] or encoded
    images, captions = (Encoded(vector=beside(rows).vector) for rows in ([s.images for s in able], [s.captions for s in able]))
    return EncodedSplit(images, captions, encoded[0].names)


def _screened(members: Sequence[Matcher], sides: Sides, how: How, screen: EncodedSplit) -> ScreenedScores:
    vectors, owners = unit_vectors(screen.images, screen.captions), screen.names.caption_image
    cheap = by_cosine(vectors)
    options = {"precision": how.precision, "device": resolve_device()}
    if how.screen == "auto":
        k = choose_k(probe(members, sides, cheap, (owners, how.screen_queries, 1), options), how.screen_loss)
    else:
        k = int(how.screen or 0)
    scores = screened_scores(members, sides, k, vectors, options)
    # A sample of its own: the one that chose k flatters it.
    loss = probe(members, sides, cheap, (owners, how.screen_queries, 2), options)
    pairs = scores.shape[0] * scores.shape[1]
    scores.report = {"k": k, "scored": len(scores.values) / pairs, "loss": {p.way: p.report(k) for p in loss}}
    return scores


def _set_pruning(members: Sequence[Matcher], prune: Prune) -> None:
    able = [member for member in members if member.prunes]
    if prune != "off" and not able:
        kinds = ", ".join(type(member).__name__ for member in members)
        raise ValueError(f"--prune {prune} needs a UARDA matcher, which has a threshold to prune by; this is {kinds}: leave --prune out")
    for member in able:
        member.pruning = None if prune == "off" else Pruning(prune)


def _set_threshold(members: Sequence[Matcher], said: str) -> None:
    able = [member for member in members if isinstance(member, UARDA)]
    value = threshold_of(said)
    if not able or value is None:
        kinds = ", ".join(type(member).__name__ for member in members)
        raise ValueError(f"--eval-threshold {said} needs a UARDA matcher, which scores above a threshold; this is {kinds}: leave it out")
    for member in able:
        member.eval_threshold = value  # type: ignore[assignment]


def seats_for(jobs: int) -> tuple[Seats, int]:
    """Seats for so many jobs of scoring or encoding, on GPUs or with a CPU thread each, and the CPUs that each takes."""
    import ray

    from pipelines.on_ray.session import connect, core

    connect()
    cpus = core()
    seats = gpu_seats(None, jobs, cpus)
    return seats or Seats(max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus), 0, "cpu"), cpus


def by_actors(tiles: int) -> tuple[Spread, Callable[[Any], Any], str]:
    """`spread` and `put` by Ray, and the device of scoring. An actor scores one tile after the other; ranks are counted by tasks."""
    import ray

    seats, cpus = seats_for(tiles)

    def spread(work: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        return _scored(jobs, seats, cpus) if work is score_tile else _by_tasks(work, jobs, cpus)

    return spread, ray.put, seats.device


def _scored(jobs: Iterable[tuple[Any, ...]], seats: Seats, cpus: int) -> Iterator[Any]:
    """The jobs of `score_tile`; the members, which are the same in all of them, go to each actor once."""
    rest = iter(jobs)
    if (first := next(rest, None)) is None:
        return
    parts = (((uri, options), (images, captions)) for uri, _, images, captions, options in itertools.chain([first], rest))
    yield from Pool(seats, cpus, _score, first[1]).map(parts)


def _score(members: Sequence[Matcher], uri: str, options: Options, images: list[Encoded], captions: list[Encoded]) -> Any:
    return score_tile(uri, members, images, captions, options)


def _by_tasks(work: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], cpus: int) -> Iterator[Any]:
    import ray

    task = ray.remote(num_cpus=cpus)(work)
    window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus)
    running: deque[Any] = deque()
    for job in jobs:
        running.append(task.remote(*job))
        if len(running) >= window:
            yield fetched(running.popleft())
    while running:
        yield fetched(running.popleft())
