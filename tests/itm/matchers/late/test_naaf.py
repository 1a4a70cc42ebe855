"""NAAF's walk through a batch, and its root."""

from __future__ import annotations

import math

import pytest
import torch

from itm.matchers.late.naaf import NaafState, naaf_threshold, naaf_walk, own_first
from itm.matchers.late.uarda_threshold import relevance_threshold


def test_the_walk_of_naaf_uses_for_each_caption_what_the_captions_before_it_left():
    """A hundred captions of six words: after the 34th there are more than 200 matched words, and the threshold moves."""
    generator = torch.Generator().manual_seed(3)
    maxima = 0.2 + 0.05 * torch.randn(100, 100, 6, generator=generator)
    maxima.diagonal(dim1=0, dim2=1).add_(0.4)
    state = NaafState(0.3, 0.3)
    used = naaf_walk(maxima, torch.ones(100, 6, dtype=torch.bool), lambda caption, t: maxima[:, caption].sum(1), state, 2.0)
    assert used[0] == 0.3
    assert used[1:34] == [0.0] * 33, "while there are too few words it is put back to 0"
    matched = torch.cat([maxima[c, c] for c in range(34)])
    wrong = torch.cat([maxima[int(maxima[:, c].sum(1).argmin()), c] for c in range(34)])
    best, _ = naaf_threshold(matched.mean().item(), matched.std().item(), wrong.mean().item(), wrong.std().item(), 2.0)
    assert used[34] == pytest.approx(0.7 * best, abs=1e-9)
    assert all(0 < t < 1 for t in used[34:])


def test_naafs_root_is_the_boundary_where_the_variances_differ_and_nothing_without_one():
    root, discriminant = naaf_threshold(0.6, 0.12, 0.2, 0.06, 2.0)
    assert discriminant > 0
    assert root == pytest.approx(relevance_threshold(0.6, 0.12, 0.2, 0.06, 2.0).item(), abs=1e-5)
    nothing, discriminant = naaf_threshold(0.3, 0.3, 0.3, 0.1, 1e-6)
    assert math.isnan(nothing) == (discriminant <= 0)


def test_a_caption_whose_own_image_ties_for_the_best_is_right_and_the_first_of_the_lowest_is_its_negative():
    scores = torch.tensor([0.1, 0.9, 0.1, 0.9])
    assert [own_first(caption, scores) for caption in range(4)] == [(1, 0), (1, 0), (1, 0), (3, 0)]


def test_a_wrong_caption_moves_no_threshold_though_enough_words_are_pooled():
    """Two right captions pool 240 words; a wrong third one leaves what the second has set."""
    torch.manual_seed(0)
    maxima = 0.2 + 0.1 * torch.rand(3, 3, 120) + 0.4 * torch.eye(3)[:, :, None]
    state = NaafState(0.0, 0.0)
    after: list[tuple[float, float]] = []

    def score(caption: int, t: float) -> torch.Tensor:
        after.append((state.t, state.t_safe))
        return torch.eye(3)[0 if caption == 2 else caption]

    naaf_walk(maxima, torch.ones(3, 120, dtype=torch.bool), score, state, 2.0)
    assert after[1] == (0.0, 0.0)
    assert after[2] == (state.t, state.t_safe) != (0.0, 0.0)
