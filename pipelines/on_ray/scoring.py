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
from typing import Any

import torch
from torch import Tensor

from itm.data.formats import Json
from itm.device import resolve_device
from itm.evaluation.dataset import EncodedSplit
from itm.evaluation.metrics import Scores
from itm.evaluation.scoring import score_matrix
from itm.evaluation.screen import ScreenedScores, Sides, choose_k, probe, screened_scores, unit_vectors
from itm.evaluation.streamed import TiledScores
from itm.evaluation.tiles import Grid, Spread, TileStore, fill, score_tile
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

    folds: in memory, only so many blocks of images are scored, each with its own captions; the other scores are -inf.

    root: where stores lie. identity: what the scores depend on besides `how`, for the store.
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
    many = 4 * pairs * folds > DENSE_BYTES or (costly and pairs > IN_PROCESS_PAIRS)
    if not (how.distributed or many or (costly and gpus_elsewhere())):
        options["device"] = resolve_device()
        if folds > 1:
            return _fold_scores(members, sides, encoded[0].names.caption_image, folds, options)
        return score_matrix(list(members), [i for i, _ in sides], [c for _, c in sides], **options)
    # Captions lie in the order of the lengths that one member sees; the others are cut to the longest of each tile all the same.
    images, captions = next((side for side in sides if side[1].mask is not None), sides[0])
    grid = Grid.of(members, images, captions, how.block)
    spread, put, options["device"] = by_actors(len(grid.tiles))
    identity = {**identity, **options, "compile": how.compile, "prune": how.prune, "torch": torch.__version__}
    identity |= {} if how.eval_threshold is None else {"eval_threshold": threshold_of(str(how.eval_threshold))}
    store = TileStore.create(root, identity, grid, captions)
    names = encoded[0].names.image_keys, encoded[0].names.caption_ids
    with shared({"output": root}):
        pass  # who joins later writes a tile that the driver then misses, and says so
    fill(store, [member.cpu() for member in members], sides, names, spread, put, options)
    return TiledScores(store, spread)


def _fold_scores(members: Sequence[Matcher], sides: Sides, caption_image: Tensor, folds: int, options: Json) -> Tensor:
    images = len(sides[0][0])
    scores, size = torch.full((images, len(caption_image)), -torch.inf), images // folds
    for start in range(0, size * folds, size):
        columns = ((caption_image >= start) & (caption_image < start + size)).nonzero()[:, 0]
        own = [i[start : start + size] for i, _ in sides], [c[columns] for _, c in sides]
        scores[start : start + size, columns] = score_matrix(list(members), *own, **options)
    return scores


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
    options = {"precision": how.precision, "device": resolve_device()}
    if how.screen == "auto":
        k = choose_k(probe(members, sides, vectors, (owners, how.screen_queries, 1), options), how.screen_loss)
    else:
        k = int(how.screen or 0)
    scores = screened_scores(members, sides, k, vectors, options)
    # A sample of its own: the one that chose k flatters it.
    loss = probe(members, sides, vectors, (owners, how.screen_queries, 2), options)
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
