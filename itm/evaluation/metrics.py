"""Retrieval metrics from a score matrix: recall@K, ranks, and equivalence-set metrics (mAP@R, R-precision), with chance levels.

Everything is counted, nothing is sorted over the gallery: a query's rank is the number of negatives ahead of its positive, taken
from the same score block as the positive itself. Queries are walked in blocks, so the (I,T) matrix is never copied whole; it may be a
memory-mapped numpy array.

Recalls are percent (0..100); mAP@R and R-precision are fractions (0..1); medR and meanR start at 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from itm.evaluation import TIES
from itm.evaluation.counting import blocks, ranks_in

# How equal scores are ordered. pessimistic: negatives first. optimistic: positives first. official: the later index first, which is
# the authors' "ascending argsort, reversed" made deterministic. official_iais: the same, with the t2i recall inflated as the
# IAIS and UNITER code inflates it. lower_index: the earlier index first (a stable descending sort).
KS = (1, 5, 10)

Positives = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Ranking:
    """What one direction of retrieval gave, one row a query; queries without positives have `positives` 0 and are not averaged.

    best (Q,) int64: negatives ahead of the best positive (0 = top hit); positives (Q,) int64: R, the number of positives;
    average_precision (Q,), r_precision (Q,) float64 over the top R.
    """

    best: Tensor
    positives: Tensor
    average_precision: Tensor
    r_precision: Tensor

    @classmethod
    def cat(cls, pieces: Sequence[Ranking]) -> Ranking:
        """Blocks of queries, in order."""
        return cls(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in cls.__dataclass_fields__))

    @property
    def asked(self) -> Tensor:
        return self.positives > 0

    def recall(self, k: int) -> float:
        """Percent of queries with a positive among the first k."""
        return 100.0 * float((self.best[self.asked] < k).double().mean())

    def median_rank(self) -> float:
        return math.floor(float(np.median(self.best[self.asked].numpy()))) + 1.0

    def mean_rank(self) -> float:
        return float(self.best[self.asked].double().mean()) + 1.0


class Streamed:
    """Scores (I,T) without NaN that are never held whole: they rank their own rows, and `scores[rows]` gives the dense rows."""

    shape: tuple[int, int]
    dtype = "float32"

    @property
    def T(self) -> Streamed:
        raise NotImplementedError

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        raise NotImplementedError

    def rank(self, positives: Positives, tie: str, absent: Tensor | None = None) -> Ranking:
        """See `rank_queries`."""
        raise NotImplementedError


Scores = Tensor | np.ndarray | Streamed


def retrieval_metrics(scores: Scores, positives: Positives, relevance: Tensor | None = None, tie: str = "pessimistic") -> dict[str, float]:
    """Metrics of both directions from scores (I,T), larger = better.

    positives: the annotated pairs, (I,T) bool or the ids (image_ids (I,), caption_image_ids (T,)); every query needs one.
    relevance (I,T) bool: all pairs that truly hold; mAP@R, R-precision and semantic R@1 are taken over it, else over `positives`.
    Keys: {i2t,t2i}_r{1,5,10} (percent), _medr, _meanr, _r_mean, _map_at_r, _r_precision (0..1), with relevance also _semantic_r1
    (percent); r_mean (mean of the two direction means) and rsum (sum of the six recalls).
    Raises ValueError for NaN scores, shapes that differ, or a query without a positive, with counts and the first index.
    """
    check_scores(scores, positives)
    return checked_metrics(scores, positives, relevance, tie)


def checked_metrics(scores: Scores, positives: Positives, relevance: Tensor | None = None, tie: str = "pessimistic") -> dict[str, float]:
    """`retrieval_metrics` of scores that `check_scores` has passed: it reads the whole matrix, once is enough."""
    metrics: dict[str, float] = {}
    for way, by_query, truth, wider in _directions(scores, positives, relevance):
        annotated = rank_queries(by_query, truth, tie)
        _require_positives(annotated, "image" if way == "i2t" else "caption")
        metrics |= {f"{way}_{name}": value for name, value in _recalls(annotated, by_query, truth, way, tie).items()}
        exact = annotated if wider is None else rank_queries(by_query, wider, tie)
        metrics |= {f"{way}_{name}": value for name, value in equivalence_metrics(exact).items() if name != "semantic_r1"}
        if wider is not None:
            metrics[f"{way}_semantic_r1"] = exact.recall(1)
    return with_sums(metrics)


def rank_queries(scores: Scores, positives: Positives, tie: str = "pessimistic", absent: Tensor | None = None) -> Ranking:
    """Rank every row of scores (Q,G) against its positives, (Q,G) bool or (query_ids (Q,), gallery_ids (G,)).

    absent (Q,) int64: positives that are not in the gallery; they count in R and can never be hit.

    With the positives of a query in order of score, the k-th has rank n_k + k, n_k = negatives ahead of it, and the hits above it are k:
    mAP@R = mean over queries of (1/R) sum_{k: n_k + k <= R} k / (n_k + k); R-precision = #{k: n_k + k <= R} / R
    (docs/methods/cusa.md#equivalence-metrics).
    """
    if tie not in TIES:
        raise ValueError(f"unknown tie rule {tie!r}; known: {', '.join(TIES)}")
    if isinstance(scores, Streamed):
        return scores.rank(positives, tie, absent)
    query, column = pairs_of(positives)
    counts = torch.bincount(query, minlength=scores.shape[0])
    rank = ranks_in(scores, query, column, counts, tie)
    return ranking_of(query, rank, counts, 0 if absent is None else absent, scores.shape[1])


def equivalence_metrics(ranking: Ranking) -> dict[str, float]:
    """mAP@R and R-precision (0..1) and semantic R@1 (percent: the top hit is a positive) over the queries that have positives."""
    asked = ranking.asked
    return {
        "map_at_r": float(ranking.average_precision[asked].mean()),
        "r_precision": float(ranking.r_precision[asked].mean()),
        "semantic_r1": ranking.recall(1),
    }


def with_sums(metrics: dict[str, float]) -> dict[str, float]:
    """Add the direction means, r_mean and rsum to a dict that holds the six recalls."""
    for way in ("i2t", "t2i"):
        metrics[f"{way}_r_mean"] = sum(metrics[f"{way}_r{k}"] for k in KS) / len(KS)
    metrics["r_mean"] = (metrics["i2t_r_mean"] + metrics["t2i_r_mean"]) / 2
    metrics["rsum"] = 2 * len(KS) * metrics["r_mean"]
    return metrics


def chance_metrics(positives: Positives, relevance: Tensor | None = None) -> dict[str, float]:
    """What a random order without ties scores on average, under the keys of `retrieval_metrics` (medR has no entry).

    With R positives among M: P(rank < K) = 1 - C(M-R,K)/C(M,K); E[R-precision] = R/M; E[meanR] = (M+1)/(R+1);
    E[AP@R] = (1/M) sum_{r<=R} (1 + (r-1)(R-1)/(M-1)) / r.
    """
    annotated, wider = positive_counts(positives), positive_counts(positives if relevance is None else relevance)
    metrics: dict[str, float] = {}
    for way, counts, exact, gallery in zip(("i2t", "t2i"), annotated, wider, (len(annotated[1]), len(annotated[0])), strict=True):
        found = chance_of(counts, gallery) | {k: v for k, v in chance_of(exact, gallery).items() if k in ("map_at_r", "r_precision")}
        metrics |= {f"{way}_{name}": value for name, value in found.items()}
        if relevance is not None:
            metrics[f"{way}_semantic_r1"] = 100 * metrics[f"{way}_r_precision"]
    return with_sums(metrics)


def chance_of(counts: Tensor, gallery: int, absent: Tensor | None = None, ks: Sequence[int] = KS) -> dict[str, float]:
    """Chance of one direction, r1 r5 r10 (or of `ks`) meanr map_at_r r_precision, for counts (Q,) positives among `gallery` rows.

    absent (Q,): positives outside the gallery, as in `rank_queries`; queries without any positive are left out.
    """
    wanted = counts if absent is None else counts + absent
    base = int(wanted.max()) + 1 if len(wanted) else 1
    codes, times = torch.unique((counts * base + wanted)[wanted > 0], return_counts=True)  # unique pairs of rows take ten times as long
    shares = (times.double() / times.sum()).tolist()
    sizes = list(zip((codes // base).tolist(), (codes % base).tolist(), shares, strict=True))
    found = {f"r{k}": 100 * sum(p * _chance_recall(n, gallery, k) for n, _, p in sizes) for k in ks}
    return found | {
        "meanr": sum(p * (gallery + 1) / (n + 1) for n, _, p in sizes),
        "map_at_r": sum(p * _chance_average_precision(n, r, gallery) for n, r, p in sizes),
        "r_precision": sum(p * n / gallery for n, _, p in sizes),
    }


def positive_counts(positives: Positives) -> tuple[Tensor, Tensor]:
    """Number of positives of every image (I,) and of every caption (T,), int64."""
    if isinstance(positives, tuple):
        images, captions = positives
        return _matches(images, captions), _matches(captions, images)
    return positives.sum(1), positives.sum(0)


def check_scores(scores: Scores, positives: Positives, names: tuple[Sequence[str], Sequence[str]] | None = None) -> None:
    """Raises ValueError when shapes differ or a score is NaN, naming the count and the first pair (by position, or by its names)."""
    expected = tuple(map(len, positives)) if isinstance(positives, tuple) else tuple(positives.shape)
    if tuple(scores.shape) != expected:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, but the truth has {expected[0]} images x {expected[1]} captions")
    if isinstance(scores, Streamed):
        return
    count, first = 0, (0, 0)
    for start, block in blocks(scores):
        if np.isnan(block.max(initial=-np.inf)):  # a maximum of NaN costs less than a mask
            bad = np.argwhere(np.isnan(block))
            first = first if count else (start + int(bad[0, 0]), int(bad[0, 1]))
            count += len(bad)
    if count:
        image, caption = first if names is None else (repr(names[0][first[0]]), repr(names[1][first[1]]))
        raise ValueError(f"{count} of {math.prod(expected)} scores are NaN, the first at image {image}, caption {caption}")


def _directions(scores: Scores, positives: Positives, relevance: Tensor | None) -> list[tuple[str, Scores, Positives, Tensor | None]]:
    turned: Positives = (positives[1], positives[0]) if isinstance(positives, tuple) else positives.T
    return [("i2t", scores, positives, relevance), ("t2i", scores.T, turned, None if relevance is None else relevance.T)]


def pairs_of(positives: Positives) -> tuple[Tensor, Tensor]:
    """(query (P,), column (P,)) of every positive, by query, then column."""
    if not isinstance(positives, tuple):
        query, column = positives.cpu().nonzero(as_tuple=True)
        return query, column
    queries, gallery = (ids.cpu() for ids in positives)
    gallery, order = gallery.sort(stable=True)
    first, last = (torch.searchsorted(gallery, queries, right=right) for right in (False, True))
    counts = last - first
    query = torch.arange(len(queries)).repeat_interleave(counts)
    place = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
    return query, order[first[query] + place]


def ranking_of(query: Tensor, rank: Tensor, counts: Tensor, absent: Tensor | int, gallery: int) -> Ranking:
    """The result from the ranks (P,) of the positives, by query and rank; counts (Q,) a query; gallery: rank where there is none."""
    wanted = counts + absent
    k = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query] + 1
    inside = rank <= wanted[query]
    best = torch.full((len(counts),), gallery)
    best[counts > 0] = rank[k == 1] - 1
    total = wanted.clamp(min=1)
    ap, hits = (
        torch.zeros(len(counts), dtype=torch.float64).index_add_(0, query, gain) / total
        for gain in (torch.where(inside, k.double() / rank, 0.0), inside.double())
    )
    return Ranking(best, wanted, ap, hits)


def _recalls(ranking: Ranking, scores: Scores, truth: Positives, way: str, tie: str) -> dict[str, float]:
    recalls = {f"r{k}": ranking.recall(k) for k in KS}
    if tie == "official_iais" and way == "t2i":
        # Their count runs over (row, rank) index pairs whose image is in the top 10, so a row number below K also counts.
        listed = ranking.best < max(KS)
        recalls = {f"r{k}": recalls[f"r{k}"] + 100 * float(listed[:k].sum()) / len(listed) for k in KS}
    return recalls | {"medr": ranking.median_rank(), "meanr": ranking.mean_rank()}


def _require_positives(ranking: Ranking, what: str) -> None:
    missing = (~ranking.asked).nonzero()[:, 0].tolist()
    if missing:
        raise ValueError(f"{len(missing)} of {len(ranking.asked)} {what}s have no positive pair, the first is {what} {missing[0]}")


def _matches(queries: Tensor, gallery: Tensor) -> Tensor:
    ids, inverse = torch.unique(torch.cat([queries, gallery]), return_inverse=True)
    return torch.bincount(inverse[len(queries) :], minlength=len(ids))[inverse[: len(queries)]]


def _chance_recall(positives: int, gallery: int, k: int) -> float:
    miss = math.prod((gallery - positives - i) / (gallery - i) for i in range(min(k, gallery)))
    return 1.0 - max(miss, 0.0)


def _chance_average_precision(positives: int, wanted: int, gallery: int) -> float:
    others = (positives - 1) / (gallery - 1) if gallery > 1 else 0.0
    return positives / gallery * sum((1 + (r - 1) * others) / r for r in range(1, min(wanted, gallery) + 1)) / wanted
