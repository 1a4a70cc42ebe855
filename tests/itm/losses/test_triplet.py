"""The hinge triplet loss against loops written from the equation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from itm.losses.triplet import triplet_loss


def by_hand(scores: Tensor, positives: Tensor, anchors: list[tuple[int, int]], margin: float, hardest: bool) -> float:
    total = 0.0
    for i, t in anchors:
        captions = [max(0.0, float(margin + scores[i, c] - scores[i, t])) for c in range(scores.shape[1]) if not positives[i, c]]
        images = [max(0.0, float(margin + scores[j, t] - scores[i, t])) for j in range(scores.shape[0]) if not positives[j, t]]
        for costs in (captions, images):
            total += (max(costs, default=0.0)) if hardest else sum(costs)
    return total


@pytest.mark.parametrize("hardest", [True, False])
def test_the_loss_is_a_sum_over_both_directions(hardest: bool):
    scores = torch.randn(5, 5, dtype=torch.float64)
    want = by_hand(scores, torch.eye(5, dtype=torch.bool), [(k, k) for k in range(5)], 0.2, hardest)
    assert float(triplet_loss(scores, hardest=hardest)) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("hardest", [True, False])
def test_captions_of_the_same_image_are_never_negatives_unless_official(hardest: bool):
    scores, ids = torch.randn(4, 4, dtype=torch.float64), torch.tensor([7, 3, 7, 1])
    positives, anchors = ids[:, None] == ids[None], [(k, k) for k in range(4)]
    want = by_hand(scores, positives, anchors, 0.3, hardest)
    assert float(triplet_loss(scores, ids, margin=0.3, hardest=hardest)) == pytest.approx(want, abs=1e-12)
    assert float(triplet_loss(scores, positives, margin=0.3, hardest=hardest)) == pytest.approx(want, abs=1e-12)
    official = by_hand(scores, torch.eye(4, dtype=torch.bool), anchors, 0.3, hardest)
    assert float(triplet_loss(scores, ids, margin=0.3, hardest=hardest, official=True)) == pytest.approx(official, abs=1e-12)


def test_with_several_captions_an_image_every_positive_pair_is_an_anchor():
    scores = torch.randn(2, 5, dtype=torch.float64)
    positives = torch.tensor([[True, True, False, False, True], [False, False, True, True, False]])
    anchors = [(int(i), int(t)) for i, t in positives.nonzero()]
    assert float(triplet_loss(scores, positives)) == pytest.approx(by_hand(scores, positives, anchors, 0.2, True), abs=1e-12)


def test_permuting_the_batch_does_not_change_the_loss():
    scores, ids, order = torch.randn(6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 3, 4]), torch.randperm(6)
    assert float(triplet_loss(scores[order][:, order], ids[order])) == pytest.approx(float(triplet_loss(scores, ids)), abs=1e-12)


def test_a_batch_without_negatives_costs_nothing_and_has_a_gradient_of_zero():
    scores = torch.randn(3, 3, requires_grad=True)
    loss = triplet_loss(scores, torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(scores.grad, torch.zeros(3, 3))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="positives must be bool"):
        triplet_loss(torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="as many images as captions"):
        triplet_loss(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), official=True)
    with pytest.raises(ValueError, match="scores must be"):
        triplet_loss(torch.zeros(3))
