"""How sure a difference between two matchers is: a paired bootstrap over images."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from itm.evaluation.dataset import Names
from itm.evaluation.metrics import KS, Scores, rank_queries

RESAMPLES = 2000
BLOCK = 64  # resamples at a time


def hits_by_image(scores: Scores, names: Names, tie: str) -> tuple[np.ndarray, np.ndarray]:
    """Hits (I, 6) float64 of each image's queries, R@1 R@5 R@10 as an image and summed over its captions, and the queries (I, 6)."""
    images, captions = names.positives
    one = rank_queries(scores, (images, captions), tie).best
    other = rank_queries(scores.T, (captions, images), tie).best
    owner = captions.numpy()
    count = np.bincount(owner, minlength=len(images)).astype(np.float64)
    hits = [(one < k).double().numpy() for k in KS]
    hits += [np.bincount(owner, weights=_as_numbers(other < k), minlength=len(images)) for k in KS]
    return np.stack(hits, 1), np.stack([np.ones(len(images))] * len(KS) + [count] * len(KS), 1)


def _as_numbers(hit: Tensor) -> np.ndarray:
    return hit.double().numpy()


def paired_intervals(a: np.ndarray, b: np.ndarray, queries: np.ndarray, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Metric -> (difference b - a, lower, upper end of its 95 % interval), in percent points; a, b, queries: as of `hits_by_image`.

    Images are drawn with replacement, the same for both, and each brings its captions: these are not independent questions.
    """
    names = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in KS]
    generator, rows = np.random.default_rng(seed), []
    for start in range(0, RESAMPLES, BLOCK):
        weights = generator.multinomial(len(a), np.full(len(a), 1 / len(a)), size=min(BLOCK, RESAMPLES - start)).astype(np.float64)
        rows.append(100 * (weights @ (b - a)) / (weights @ queries))
    drawn, whole = np.concatenate(rows), 100 * (b - a).sum(0) / queries.sum(0)
    drawn, whole = np.c_[drawn, drawn.sum(1)], np.r_[whole, whole.sum()]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {name: (float(d), float(x), float(y)) for name, d, x, y in zip([*names, "rsum"], whole, low, high, strict=True)}
