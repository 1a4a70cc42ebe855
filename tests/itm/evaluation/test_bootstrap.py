"""Paired bootstrap intervals of two matchers, against a slow loop and against the truth of many worlds."""

from __future__ import annotations

import numpy as np
import torch

from itm.evaluation.bootstrap import hits_by_image, paired_intervals
from itm.evaluation.dataset import names_of
from itm.evaluation.metrics import retrieval_metrics


def world(seed: int, images: int = 40, per_image: int = 3, strength: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(images).repeat_interleave(per_image)
    scores = torch.randn(images, len(owner), generator=generator) + strength * (torch.arange(images)[:, None] == owner)
    return scores, names_of(images, owner)


def test_the_differences_are_those_of_the_metrics() -> None:
    (a, names), (b, _) = world(0), world(1, strength=2.0)
    (hits_a, queries), (hits_b, _) = (hits_by_image(s, names, "pessimistic") for s in (a, b))
    found = paired_intervals(hits_a, hits_b, queries)
    one, other = (retrieval_metrics(s, names.positives) for s in (a, b))
    for name, (difference, low, high) in found.items():
        assert abs(difference - (other[name] - one[name])) < 1e-9
        assert low <= difference <= high


def test_the_interval_is_that_of_a_loop_over_resampled_images() -> None:
    (a, names), (b, _) = world(2), world(3, strength=2.0)
    (hits_a, queries), (hits_b, _) = (hits_by_image(s, names, "pessimistic") for s in (a, b))
    chance = np.random.default_rng(9)
    drawn = []
    for _ in range(4000):
        rows = chance.integers(0, 40, 40)
        drawn.append(100 * (hits_b[rows, 3].sum() - hits_a[rows, 3].sum()) / queries[rows, 3].sum())
    _, low, high = paired_intervals(hits_a, hits_b, queries)["t2i_r1"]
    np.testing.assert_allclose([low, high], np.percentile(drawn, [2.5, 97.5]), atol=1.5)


def test_the_same_scores_differ_by_nothing() -> None:
    scores, names = world(4)
    hits, queries = hits_by_image(scores, names, "pessimistic")
    assert set(paired_intervals(hits, hits, queries).values()) == {(0.0, 0.0, 0.0)}
