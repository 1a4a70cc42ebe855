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
from typing import Any

import numpy as np
import torch
from torch import Tensor

# How equal scores are ordered. pessimistic: negatives first. optimistic: positives first. official: the later index first, which is
# the authors' "ascending argsort, reversed" made deterministic. official_iais: the same, with the t2i recall inflated as the
# IAIS and UNITER code inflates it. lower_index: the earlier index first (a stable descending sort).
TIES = ("pessimistic", "optimistic", "official", "official_iais", "lower_index")
KS = (1, 5, 10)
BLOCK_SCORES = 4 << 20

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
    mAP@R = mean over queries of (1/R) sum_{k: n_k + k <= R} k / (n_k + k); R-precision = #{k: n_k + k <= R} / R (cusa.md 5.2).
    """
    if tie not in TIES:
        raise ValueError(f"unknown tie rule {tie!r}; known: {', '.join(TIES)}")
    if isinstance(scores, Streamed):
        return scores.rank(positives, tie, absent)
    rows = max(1, BLOCK_SCORES // max(1, scores.shape[1]))
    absent = torch.zeros(scores.shape[0], dtype=torch.int64) if absent is None else absent
    blocks = (slice(q, q + rows) for q in range(0, scores.shape[0], rows))
    pieces = [_rank_block(*_block(scores, positives, block), absent[block], tie) for block in blocks]
    return Ranking(*(torch.cat(column) for column in zip(*pieces, strict=True)))


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
    image_counts, caption_counts = positive_counts(positives)
    exact = (image_counts, caption_counts) if relevance is None else positive_counts(relevance)
    metrics: dict[str, float] = {}
    pairs = (("i2t", image_counts, exact[0], len(caption_counts)), ("t2i", caption_counts, exact[1], len(image_counts)))
    for way, counts, wider, gallery in pairs:
        for k in KS:
            metrics[f"{way}_r{k}"] = 100 * _mean_over(counts, lambda n, k=k, g=gallery: _chance_recall(n, g, k))
        metrics[f"{way}_meanr"] = _mean_over(counts, lambda n, g=gallery: (g + 1) / (n + 1))
        metrics[f"{way}_map_at_r"] = _mean_over(wider, lambda n, g=gallery: _chance_average_precision(n, g))
        metrics[f"{way}_r_precision"] = _mean_over(wider, lambda n, g=gallery: n / g)
        if relevance is not None:
            metrics[f"{way}_semantic_r1"] = 100 * metrics[f"{way}_r_precision"]
    return with_sums(metrics)


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
    rows = max(1, BLOCK_SCORES // max(1, scores.shape[1]))
    count, first = 0, (0, 0)
    for start in range(0, scores.shape[0], rows):
        bad = _rows(scores, slice(start, start + rows)).isnan()
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            first = first if count else (start + row, column)
            count += int(bad.sum())
    if count:
        image, caption = first if names is None else (repr(names[0][first[0]]), repr(names[1][first[1]]))
        raise ValueError(f"{count} of {math.prod(expected)} scores are NaN, the first at image {image}, caption {caption}")


def _directions(scores: Scores, positives: Positives, relevance: Tensor | None) -> list[tuple[str, Scores, Positives, Tensor | None]]:
    turned: Positives = (positives[1], positives[0]) if isinstance(positives, tuple) else positives.T
    return [("i2t", scores, positives, relevance), ("t2i", scores.T, turned, None if relevance is None else relevance.T)]


def _block(scores: Tensor | np.ndarray, positives: Positives, rows: slice) -> tuple[Tensor, Tensor]:
    truth = positives[0][rows, None] == positives[1][None, :] if isinstance(positives, tuple) else positives[rows].contiguous()
    return _rows(scores, rows), truth.cpu()


def _rows(scores: Tensor | np.ndarray, rows: slice) -> Tensor:
    """A block of rows in memory of its own order; a mapped file may be read-only, hence the copy."""
    return scores[rows].contiguous().cpu() if isinstance(scores, Tensor) else torch.from_numpy(np.array(scores[rows], order="C"))


def _rank_block(scores: Tensor, truth: Tensor, absent: Tensor, tie: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every positive of the block becomes one row (query, column), ordered by query, then score, then the tie rule's index."""
    query, column = truth.nonzero(as_tuple=True)
    if tie.startswith("official"):
        query, column = query.flip(0), column.flip(0)
    own = scores[query, column]
    order = own.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    query, column, own = query[order], column[order], own[order]
    counts = truth.sum(1)
    starts = counts.cumsum(0) - counts
    k = torch.arange(len(query)) - starts[query] + 1
    rank = _negatives_ahead(scores, truth, (query, column, own), tie) + k
    wanted = counts + absent
    inside = rank <= wanted[query]
    gain = torch.where(inside, k.double() / rank, 0.0)
    best = torch.full((len(scores),), scores.shape[1])
    best[counts > 0] = rank[k == 1] - 1
    total = wanted.clamp(min=1)
    ap = torch.zeros(len(scores), dtype=torch.float64).index_add_(0, query, gain) / total
    hits = torch.zeros(len(scores), dtype=torch.float64).index_add_(0, query, inside.double()) / total
    return best, wanted, ap, hits


def _negatives_ahead(scores: Tensor, truth: Tensor, pairs: tuple[Tensor, Tensor, Tensor], tie: str) -> Tensor:
    """(P,) int64: negatives that the tie rule puts ahead of each positive (query, column, own score)."""
    negatives = scores.masked_fill(truth, -torch.inf)
    index = torch.arange(scores.shape[1])
    step = max(1, BLOCK_SCORES // scores.shape[1])
    counts = [torch.zeros(0, dtype=torch.int64)]
    for p in range(0, len(pairs[0]), step):
        query, column, own = (x[p : p + step, None] for x in pairs)
        rivals = negatives[query[:, 0]]
        if tie == "pessimistic":
            # A positive at -inf ties with the masked positives: only true negatives may count.
            ahead = rivals >= own if torch.isfinite(own).all() else (rivals >= own) & ~truth[query[:, 0]]
        elif tie == "optimistic":
            ahead = rivals > own
        else:
            earlier = index < column if tie == "lower_index" else index > column
            ahead = (rivals > own) | ((rivals == own) & earlier & ~truth[query[:, 0]])
        counts.append(ahead.sum(1))
    return torch.cat(counts)


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


def _mean_over(counts: Tensor, value: Any) -> float:
    """Mean of value(R) over the queries with R > 0, each distinct R computed once."""
    sizes, times = torch.unique(counts[counts > 0], return_counts=True)
    if not len(sizes):
        return math.nan
    return sum(value(n) * t for n, t in zip(sizes.tolist(), times.tolist(), strict=True)) / int(times.sum())


def _chance_recall(positives: int, gallery: int, k: int) -> float:
    miss = math.prod((gallery - positives - i) / (gallery - i) for i in range(min(k, gallery)))
    return 1.0 - max(miss, 0.0)


def _chance_average_precision(positives: int, gallery: int) -> float:
    others = (positives - 1) / (gallery - 1) if gallery > 1 else 0.0
    return sum((1 + (r - 1) * others) / r for r in range(1, positives + 1)) / gallery
