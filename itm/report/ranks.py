"""Where the right answers stand: how the ranks of all queries are spread, and the queries whose answer stands last."""

from __future__ import annotations

import itertools
import math
from typing import TypedDict

import torch
from torch import Tensor

from itm.evaluation.protocols import Scored
from itm.report.gallery import Example, example, rows_of

STEPS = (1, 2, 3, 4, 5, 6, 11, 21, 51)  # first ranks of the intervals; then 101, 201, 501, 1001, ...
WORST = 4


class Ranks(TypedDict):
    """Intervals of ranks, each from `first` up to the next one; the last ends at the size of the gallery.

    share: of the queries whose best annotated pair stands there; chance: the share that a random order would put there.
    """

    queries: int
    gallery: int
    first: list[int]
    share: list[float]
    chance: list[float]


def ranks_and_worst(scored: Scored, each: int = WORST) -> tuple[dict[str, Ranks], dict[str, list[Example]]]:
    """`t2i` and `i2t`: the spread of the ranks, and up to `each` queries of the largest rank, which is above 1, worst first.

    Of a large split they are those of evenly spread queries (`rows_of`).
    """
    ranks: dict[str, Ranks] = {}
    worst: dict[str, list[Example]] = {}
    for way in ("t2i", "i2t"):
        queries, scores, annotated, truth = rows_of(scored, way)
        rank = _rank(scores, annotated)
        ranks[way] = spread(rank, annotated.sum(1), scores.shape[1])
        last = rank.argsort(descending=True, stable=True)[:each]
        worst[way] = [example(int(queries[row]), scores[row], annotated[row], truth[row]) for row in last.tolist() if rank[row] > 1]
    return ranks, worst


def spread(rank: Tensor, positives: Tensor, gallery: int) -> Ranks:
    """Of ranks (Q,) from 1 on and the number of positives (Q,) of each query."""
    first = [start for start in _firsts(gallery) if start <= gallery]
    bounds = [*first, gallery + 1]
    share = [float(((rank >= a) & (rank < b)).double().mean()) for a, b in itertools.pairwise(bounds)]
    counts, many = positives.unique(return_counts=True)
    weights = (many / many.sum()).tolist()
    later = [sum(w * _later(b - 1, p, gallery) for w, p in zip(weights, counts.tolist(), strict=True)) for b in bounds]
    chance = [a - b for a, b in itertools.pairwise(later)]
    return {"queries": len(rank), "gallery": gallery, "first": first, "share": share, "chance": chance}


def _rank(scores: Tensor, annotated: Tensor) -> Tensor:
    """(Q,) int64: 1 + the negatives that score at least as much as the best annotated pair."""
    best = scores.masked_fill(~annotated, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~annotated).sum(1) + 1


def _firsts(gallery: int) -> list[int]:
    found, power = list(STEPS), 100
    while found[-1] <= gallery:
        found += [power + 1, 2 * power + 1, 5 * power + 1]
        power *= 10
    return found


def _later(rank: int, positives: int, gallery: int) -> float:
    """The chance that the best of the positives stands after `rank`: in a random order, the first `rank` are all negatives."""
    negatives = gallery - positives
    if rank > negatives:
        return 0.0
    log = math.lgamma(negatives + 1) - math.lgamma(negatives - rank + 1) - math.lgamma(gallery + 1) + math.lgamma(gallery - rank + 1)
    return math.exp(log)
