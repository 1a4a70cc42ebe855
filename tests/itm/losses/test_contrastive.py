from __future__ import annotations

import math

import pytest
import torch

from itm.losses.contrastive import contrastive_loss


def slow(scores, tau, positives, reduction):
    """Loops over rows, then columns; nothing shared with the code under test."""
    total = 0.0
    for s, m in ((scores, positives), (scores.T, positives.T)):
        for row, wanted in zip(s.tolist(), m.tolist(), strict=True):
            bottom = math.log(sum(math.exp(x / tau) for x in row))
            each = sum((bottom - x / tau) / sum(wanted) for x, w in zip(row, wanted, strict=True) if w)
            total += each / len(s) / (s.shape[1] if reduction == "mean" else 1)
    return total / 2


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_several_positives_match_a_loop(reduction):
    scores = torch.randn(4, 4, dtype=torch.float64)
    ids = torch.tensor([3, 5, 3, 8])
    positives = ids[:, None] == ids
    assert contrastive_loss(scores, 0.3, positives, reduction=reduction).item() == pytest.approx(
        slow(scores, 0.3, positives, reduction), abs=1e-12
    )


def test_images_and_captions_may_differ_in_number():
    scores = torch.randn(2, 5, dtype=torch.float64)
    positives = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 1, 1, 0]], dtype=torch.bool)
    assert contrastive_loss(scores, 0.5, positives, reduction="sum").item() == pytest.approx(slow(scores, 0.5, positives, "sum"), abs=1e-12)


def test_the_sum_is_the_usual_symmetric_cross_entropy_and_the_mean_is_that_over_b():
    scores, labels = torch.randn(6, 6), torch.arange(6)
    usual = (torch.nn.functional.cross_entropy(scores / 0.07, labels) + torch.nn.functional.cross_entropy(scores.T / 0.07, labels)) / 2
    torch.testing.assert_close(contrastive_loss(scores, 0.07, reduction="sum"), usual)
    torch.testing.assert_close(contrastive_loss(scores, 0.07), usual / 6)


def test_the_temperature_receives_the_hand_derived_gradient():
    """dL/dt = -(1/t) sum G X with G = (P - Y) / (B t), one direction; a symmetric matrix makes both directions equal."""
    x = torch.randn(3, 3, dtype=torch.float64)
    x = x + x.T
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    contrastive_loss(x, tau, reduction="sum").backward()
    grad = ((x / 0.4).softmax(1) - torch.eye(3)) / (3 * 0.4)
    assert tau.grad.item() == pytest.approx(-(grad * x).sum().item() / 0.4, abs=1e-12)
