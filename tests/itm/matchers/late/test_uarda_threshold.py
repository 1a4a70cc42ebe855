"""The relevance threshold: the solver against a fine grid, its gradients against differences, its update by hand."""

from __future__ import annotations

import math

import pytest
import torch

from itm.matchers.late import uarda_threshold as threshold
from itm.matchers.late.uarda_threshold import (
    RelevanceThreshold,
    ThresholdOptions,
    misclassification_cost,
    relevance_threshold,
)


def normal_tail(t: float, mean: float, deviation: float) -> float:
    """P(N > t) by the trapezoid rule over 12 deviations: no erfc."""
    x = torch.linspace(t, mean + 12 * deviation, 200_001, dtype=torch.float64) if t < mean + 12 * deviation else torch.zeros(2)
    density = (-((x - mean) ** 2) / (2 * deviation**2)).exp() / (deviation * math.sqrt(2 * math.pi))
    return float(torch.trapezoid(density, x))


def test_the_cost_is_the_two_tails_of_the_normal_distributions():
    for t in (0.0, 0.25, 0.4, 0.7):
        cost = misclassification_cost(*(torch.tensor(x, dtype=torch.float64) for x in (t, 0.6, 0.1, 0.2, 0.05, 2.0)))
        assert cost.item() == pytest.approx(2 * normal_tail(t, 0.2, 0.05) + 1 - normal_tail(t, 0.6, 0.1), abs=1e-8)


def test_the_solver_finds_the_minimum_of_a_fine_grid():
    draw = torch.rand(200, 5, dtype=torch.float64)
    parameters = [draw[:, 0], 0.02 + 0.3 * draw[:, 1], draw[:, 2] - 0.3, 0.02 + 0.3 * draw[:, 3], 0.3 + 3 * draw[:, 4]]
    t = relevance_threshold(*parameters)
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
    costs = misclassification_cost(grid[:, None], *parameters)
    assert bool((misclassification_cost(t, *parameters) <= costs.amin(0) + 1e-15).all())
    assert bool(((t == 0) | (t == 1) | ((t - grid[costs.argmin(0)]).abs() < 2e-4)).all())


def test_equal_variances_give_the_textbook_boundary():
    t = relevance_threshold(0.6, 0.1, 0.2, 0.1, 2.0)
    assert t.item() == pytest.approx(0.4 + 0.01 * torch.log(torch.tensor(2.0, dtype=torch.float64)).item() / 0.4, abs=1e-15)
    near = relevance_threshold(0.6, 0.1 + 1e-10, 0.2, 0.1, 2.0)
    assert near.item() == pytest.approx(t.item(), abs=1e-8)


def test_the_solver_refuses_what_is_no_distribution():
    with pytest.raises(ValueError, match="above 0"):
        relevance_threshold(0.5, 0.0, 0.2, 0.1, 2.0)


def test_the_update_follows_the_formulas_and_waits_for_enough_words():
    state = RelevanceThreshold(ThresholdOptions(min_words=50, kappa=1.0))
    matched, mismatched = 0.6 + 0.1 * torch.randn(60), 0.2 + 0.08 * torch.randn(60)
    state.update(matched[:49], mismatched[:49])
    assert state.t.item() == 0.0
    state.update(matched, mismatched)
    mp, sp, mn, sn = (float(f(x.double())) for x in (matched, mismatched) for f in (torch.mean, torch.std))
    best = min(relevance_threshold(mp, sp, mn, sn, 2.0).item(), mp - sp)
    assert state.t.item() == pytest.approx(0.7 * best, abs=1e-12)
    assert state.t_safe.item() == pytest.approx(0.7 * max(0.0, mp - 3 * sp), abs=1e-12)
    state.update(matched, mismatched)
    assert state.t.item() == pytest.approx(0.7 * best + 0.3 * 0.7 * best, abs=1e-12)
    assert state.report()["updates"] == 2


def test_two_ranks_update_like_one(monkeypatch: pytest.MonkeyPatch):
    alone, split = (RelevanceThreshold(ThresholdOptions(min_words=40)) for _ in range(2))
    matched, mismatched = 0.6 + 0.1 * torch.randn(60, dtype=torch.float64), 0.2 + 0.08 * torch.randn(60, dtype=torch.float64)
    alone.update(matched, mismatched)
    other = torch.stack([threshold._sums(x[25:]) for x in (matched, mismatched)])
    monkeypatch.setattr(threshold, "all_reduce_sum", lambda own: own + other)
    split.update(matched[:25], mismatched[:25])
    torch.testing.assert_close(split.t, alone.t, atol=1e-13, rtol=0)
    split.update(matched, mismatched, everywhere=True)
    alone.update(matched, mismatched, everywhere=True)
    torch.testing.assert_close(split.t, alone.t, atol=1e-13, rtol=0)


def test_the_cap_keeps_the_threshold_below_the_matched_words_and_warm_up_holds_zero():
    state = RelevanceThreshold(ThresholdOptions(min_words=10, warmup_steps=3))
    matched, mismatched = 0.19 + 0.05 * torch.randn(100), 0.30 + 0.05 * torch.randn(100)
    for _ in range(8):
        state.update(matched, mismatched)
        assert state.t.item() == 0.0, "mismatched above matched: no boundary"
    state = RelevanceThreshold(ThresholdOptions(min_words=10, warmup_steps=3))
    for step in range(8):
        state.update(mismatched, mismatched - 0.02)
        assert (state.t.item() == 0.0) == (step < 3) or state.t.item() <= float(mismatched.mean() - mismatched.std())


def test_the_gradient_of_an_interior_threshold_is_that_of_differences_and_none_reaches_a_bound():
    given = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.6, 0.11, 0.2, 0.07, 1.5)]
    assert torch.autograd.gradcheck(relevance_threshold, given)
    bound = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.9, 0.05, -0.9, 0.05, 1e-200)]
    t = relevance_threshold(*bound)
    t.backward()
    assert t.item() in (0.0, 1.0)
    assert all(x.grad.item() == 0.0 for x in bound)
