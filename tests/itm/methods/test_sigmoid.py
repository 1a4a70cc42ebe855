"""The sigmoid term against a loop over the pairs of its paper's equation (arXiv 2303.15343), alone and beside CUSA's terms."""

from __future__ import annotations

import math

import pytest
import torch

from itm.kinds import build_part
from itm.methods import METHODS
from itm.methods.terms import build_term
from itm.types import positives_from_ids
from tests.support.every_matcher import batch_of, matcher_of


def term(**options):
    return build_term("sigmoid", options, "test")


def plain(scores, ids, caption_ids, scale: float, bias: float) -> float:
    """-1/I sum_i sum_t log 1 / (1 + exp(-z (t s + b)))."""
    total = 0.0
    for i, row in enumerate(scores.tolist()):
        for t, score in enumerate(row):
            z = 1 if ids[i] == caption_ids[t] else -1
            total += math.log(1 / (1 + math.exp(-z * (scale * score + bias))))
    return -total / len(ids)


@pytest.mark.parametrize(("ids", "caption_ids"), [([0, 1, 2], [0, 1, 2]), ([0, 1], [1, 0, 0, 1, 1]), ([3, 3, 4], [3, 4, 3])])
def test_the_loss_is_the_sum_over_pairs_of_the_paper(ids: list[int], caption_ids: list[int]) -> None:
    scores = torch.rand(len(ids), len(caption_ids), dtype=torch.float64) * 2 - 1
    positives = positives_from_ids(torch.tensor(ids), torch.tensor(caption_ids))
    for options in ({}, {"scale": 2.5, "bias": 0.5}):
        wanted = plain(scores, ids, caption_ids, options.get("scale", 10.0), options.get("bias", -10.0))
        assert term(**options)(scores, positives, 0).item() == pytest.approx(wanted, rel=1e-6)
        assert term(**options, weight=0.25)(scores, positives, 0).item() == pytest.approx(wanted / 4, rel=1e-6)


def test_scale_and_bias_start_at_log_10_and_minus_10_and_learn_by_their_derivatives() -> None:
    loss = term()
    assert {name: value.item() for name, value in loss.named_parameters()} == pytest.approx({"log_scale": math.log(10), "bias": -10.0})
    scores, positives, step = torch.rand(4, 4), torch.eye(4, dtype=torch.bool), 1e-3
    loss(scores, positives, 0).backward()
    for name, value in loss.named_parameters():
        around = []
        for sign in (1, -1):
            with torch.no_grad():
                value += sign * step
                around.append(loss.double()(scores.double(), positives, 0).item())
                value -= sign * step
        assert dict(loss.named_parameters())[name].grad.item() == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-3)
    assert not any(p.requires_grad for p in term(learn=False).parameters())


@pytest.mark.parametrize(("kind", "options"), [("matching", {"loss": "sigmoid", "scale": 5.0}), ("cusa", {"sigmoid": {"scale": 5.0}})])
def test_both_methods_train_with_it(kind: str, options: dict) -> None:
    method, batch = build_part(METHODS, kind, options, "method", matcher=matcher_of("dual")), batch_of(4)
    found = method(batch)
    scores = method.matcher.score(method.matcher.encode_images(batch.images), method.matcher.encode_captions(batch.captions))
    assert found["sigmoid"].item() == pytest.approx(plain(scores, range(4), range(4), 5.0, -10.0), rel=1e-5)
    assert "itc" not in found
    sum(found.values()).backward()
    moved = {name for name, p in method.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {name for name, _ in method.named_parameters() if name.endswith(("log_scale", ".bias")) and "matcher" not in name} <= moved


def test_what_it_cannot_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale is 0\.0; it must be above 0"):
        term(scale=0.0)
    with pytest.raises(ValueError, match="Options: weight, scale, bias, learn"):
        term(tau=0.1)
    with pytest.raises(ValueError, match="unknown loss term 'sigmiod'; did you mean 'sigmoid'"):
        build_term("sigmiod", {}, "test")
