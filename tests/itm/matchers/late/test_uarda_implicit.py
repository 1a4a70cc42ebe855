"""With threshold_grad=implicit a score's gradient also goes by way of the threshold, as differences of whole scores in float64 show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from itm.matchers.late.uarda import UARDA, relevance_threshold
from itm.types import Encoded
from tests.support.late_worlds import SMALL

ROWS, WORDS, REGIONS, WIDTH = 6, 5, 4, 8


def world() -> tuple[Tensor, Tensor, Tensor]:
    """Unit regions (I,R,D), words (T,L,D) near regions of their own image, and a mask that cuts two captions; float64."""
    regions = torch.nn.functional.normalize(torch.randn(ROWS, REGIONS, WIDTH, dtype=torch.float64), dim=-1)
    near = regions[:, [0, 1, 2, 3, 0]] + 0.45 * torch.randn(ROWS, WORDS, WIDTH, dtype=torch.float64)
    mask = torch.ones(ROWS, WORDS, dtype=torch.bool)
    mask[1, 3:] = mask[4, 4:] = False
    return regions, torch.nn.functional.normalize(near, dim=-1), mask


def matcher_at(t: float, **options: Any) -> UARDA:
    rule = {"min_words": 4, "mismatch": "easiest", **options.pop("threshold", {})}
    made = UARDA(**SMALL, weights="expm1", threshold=rule, **options).double().train()
    for state in made.thresholds.values():
        state.t.fill_(t)
    return made


def sides(regions: Tensor, words: Tensor, mask: Tensor) -> tuple[Encoded, Encoded]:
    return Encoded(parts=regions, mask=torch.ones(ROWS, REGIONS, dtype=torch.bool)), Encoded(parts=words * mask[..., None], mask=mask)


def next_t(matcher: UARDA, direction: str, regions: Tensor, words: Tensor, mask: Tensor) -> float:
    """What the update rule makes of this batch, with no code of the matcher but the solver: (1 - keep) times the new value."""
    with torch.no_grad():
        scores = matcher_at(float(matcher.thresholds[direction].t), direction=direction).score(*sides(regions, words, mask))
        scores = scores if direction == "t2i" else scores.T  # (contexts, queries)
        found: dict[str, list[float]] = {"own": [], "other": []}
        for q in range(ROWS):
            if int(scores[:, q].argmax()) != q:
                continue
            other = int(scores[:, q].masked_fill(torch.arange(ROWS) == q, torch.inf).argmin())
            for name, context in (("own", q), ("other", other)):
                image, caption = (context, q) if direction == "t2i" else (q, context)
                raw = words[caption][mask[caption]] @ regions[image].T
                found[name] += (raw if direction == "t2i" else raw.T).amax(1).tolist()
        (mp, sp), (mn, sn) = ((float(x.mean()), float(x.std())) for x in (torch.tensor(v, dtype=torch.float64) for v in found.values()))
        best = float(relevance_threshold(mp, sp, mn, sn, 2.0))
        assert 0 < best < 1 and mp > mn
        return 0.7 * min(best, max(0.0, mp - matcher.rule.kappa * sp))


@pytest.mark.parametrize("kappa", [0.0, 3.0])
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_the_gradient_is_that_of_scores_whose_threshold_follows_the_batch(direction: str, kappa: float):
    regions, words, mask = world()
    weights = torch.randn(ROWS, ROWS, dtype=torch.float64)
    matcher = matcher_at(0.2, direction=direction, threshold_grad="implicit", threshold={"kappa": kappa})
    given = words.clone().requires_grad_(), regions.clone().requires_grad_()
    loss = (matcher.score(*sides(given[1], given[0], mask)) * weights).sum()
    ours = torch.autograd.grad(loss, given)
    constant = matcher_at(0.2, direction=direction, threshold={"kappa": kappa})
    torch.testing.assert_close(matcher.score(*sides(regions, words, mask)), constant.score(*sides(regions, words, mask)))
    here = {d: next_t(constant, d, regions, words, mask) for d in constant.thresholds}

    def value(step: float, moved: tuple[Tensor, Tensor]) -> float:
        at, where = words + step * moved[0], regions + step * moved[1]
        shifted = matcher_at(0.2, direction=direction, threshold={"kappa": kappa})
        for d in here:
            shifted.thresholds[d].t.fill_(0.2 + next_t(constant, d, where, at, mask) - here[d])
        with torch.no_grad():
            return float((shifted.score(*sides(where, at, mask)) * weights).sum())

    for _ in range(3):
        moved = torch.randn_like(words), torch.randn_like(regions)
        differences = (value(1e-6, moved) - value(-1e-6, moved)) / 2e-6
        assert float((ours[0] * moved[0]).sum() + (ours[1] * moved[1]).sum()) == pytest.approx(differences, rel=2e-6, abs=1e-6)
    plain = torch.autograd.grad((constant.score(*sides(given[1], given[0], mask)) * weights).sum(), given)
    assert float((ours[0] - plain[0]).abs().max()) > 1e-3, "the threshold's part of the gradient is there"


@pytest.mark.parametrize("rule", [{"min_words": 1000}, {"warmup_steps": 1}])
def test_where_the_threshold_does_not_move_the_gradient_is_that_of_a_constant(rule: dict[str, int]):
    regions, words, mask = world()
    words.requires_grad_()
    found = []
    for grad in ("implicit", "constant"):
        scores = matcher_at(0.2, threshold_grad=grad, threshold=rule).score(*sides(regions, words, mask))
        found += torch.autograd.grad(scores.square().sum(), words)
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)


def test_scores_without_a_diagonal_of_pairs_are_refused():
    regions, words, mask = world()
    images, captions = sides(regions, words, mask)
    with pytest.raises(ValueError, match="takes the pairs from the diagonal of the scores, which are 6 x 4 here"):
        matcher_at(0.2, threshold_grad="implicit").score(images, captions[:4])
