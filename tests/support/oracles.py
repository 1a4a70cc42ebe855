"""Slow and obvious versions of what the library does fast. Loops over single queries and pairs; nothing shared with the sources."""

from __future__ import annotations

import statistics

import numpy as np


def ranked(scores: np.ndarray, positives: np.ndarray, tie: str) -> list[int]:
    """Gallery indices of one query, best first."""
    last = {
        "pessimistic": lambda j: positives[j],
        "optimistic": lambda j: not positives[j],
        "official": lambda j: -j,
        "lower_index": lambda j: j,
    }[tie]
    return sorted(range(len(scores)), key=lambda j: (-scores[j], last(j)))


def retrieval(scores: np.ndarray, positives: np.ndarray, tie: str = "pessimistic") -> dict[str, float]:
    """R@K in percent, median and mean rank of the best positive, mAP@R and R-precision over the rows that have positives."""
    best, average_precision, r_precision = [], [], []
    for row, truth in zip(scores, positives, strict=True):
        if not truth.any():
            continue
        order = ranked(row, truth, tie)
        hits = [bool(truth[j]) for j in order]
        r = int(truth.sum())
        best.append(hits.index(True))
        average_precision.append(sum(sum(hits[: n + 1]) / (n + 1) for n in range(r) if hits[n]) / r)
        r_precision.append(sum(hits[:r]) / r)
    recalls = {f"r{k}": 100 * sum(rank < k for rank in best) / len(best) for k in (1, 5, 10)}
    return recalls | {
        "medr": statistics.median(best) // 1 + 1,
        "meanr": sum(best) / len(best) + 1,
        "map_at_r": sum(average_precision) / len(best),
        "r_precision": sum(r_precision) / len(best),
    }


def pairwise_scores(matcher, images, captions) -> np.ndarray:
    """Every pair by itself, captions and images encoded alone."""
    import torch

    with torch.inference_mode():
        return np.array(
            [
                [
                    float(matcher.score(matcher.encode_images(images[i : i + 1]), matcher.encode_captions(captions[t : t + 1])))
                    for t in range(len(captions))
                ]
                for i in range(len(images))
            ]
        )
