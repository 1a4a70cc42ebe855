"""train.freeze, unfreeze_step, encoder_rate and layer_decay: what learns, when, and how fast."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from itm.config import Train
from itm.methods.matching import Matching
from itm.training.freezing import in_steps, rate_scales
from itm.training.step import Step
from itm.training.switches import build_step
from tests.support.every_matcher import TOWER, batch_of, matcher_of

LAYERS = {**TOWER, "num_hidden_layers": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HF_IMAGE = {"kind": "hf_vision", "config": {"model_type": "vit", "image_size": 16, "patch_size": 4, **LAYERS}}
HF_TEXT = {"kind": "hf_text", "config": {"model_type": "bert", "max_position_embeddings": 12, **LAYERS}}
ROWS = 6


def method(name: str = "dual", **options: Any) -> Matching:
    torch.manual_seed(2)
    return Matching(matcher_of(name, **(options or {"image": HF_IMAGE, "text": HF_TEXT})), loss="contrastive")


def step_of(one: Matching, **choices: Any) -> Step:
    train = Train(**{"lr": 0.01, "weight_decay": 0.01, "clip_norm": 2.0, **choices})
    return build_step(one, train, lambda number: train.lr, 0, torch.device("cpu"))


def run(step: Step, first: int, last: int) -> None:
    for number in range(first, last):
        step([batch_of(ROWS)], number)


def weights(one: Matching, side: str) -> dict[str, Tensor]:
    tower = one.matcher.encoders()[side]
    return {name: weight.detach().clone() for name, weight in tower.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_a_frozen_encoder_is_the_same_after_steps_and_the_rest_is_not():
    one = method()
    image, text, linear = weights(one, "image"), weights(one, "text"), one.matcher.image_linear.weight.detach().clone()
    run(step_of(one, freeze=["image"]), 0, 3)
    assert not moved(image, weights(one, "image"))
    assert moved(text, weights(one, "text"))
    assert not torch.equal(linear, one.matcher.image_linear.weight)
    assert not any(weight.requires_grad for weight in one.matcher.encoders()["image"].parameters())


def test_an_encoder_learns_from_the_step_on_that_unfreezes_it():
    one = method()
    step = step_of(one, freeze=["text"], unfreeze_step=2)
    before = weights(one, "text")
    run(step, 0, 2)
    assert not moved(before, weights(one, "text"))
    assert step.optimizer_state()["state"].keys() < set(range(len(list(one.parameters()))))
    run(step, 2, 3)
    assert moved(before, weights(one, "text"))


def test_a_frozen_encoder_counts_in_no_gradient_norm():
    """With the clip, the head's first step is that of a model whose tower never had a gradient."""
    frozen, held = method(), method()
    run(step_of(frozen, freeze=["image", "text"], optimizer="adam", clip_norm=1e-3, weight_decay=0.0), 0, 1)
    run(step_of(held, freeze=["image", "text"], unfreeze_step=5, optimizer="adam", clip_norm=1e-3, weight_decay=0.0), 0, 1)
    assert torch.equal(frozen.matcher.image_linear.weight, held.matcher.image_linear.weight)


def test_rates_fall_layer_by_layer_from_the_top_down():
    one = method()
    scales = rate_scales(one, Train(encoder_rate=0.5, layer_decay=0.1))
    assert {name for name in scales if not name.startswith(("matcher.image_encoder.", "matcher.text_encoder."))} == set()

    def of(piece: str) -> set[float]:
        return {round(scale, 9) for name, scale in scales.items() if piece in name}

    assert of("text_encoder.model.embeddings") == {0.0005}
    assert [of(f"text_encoder.model.encoder.layer.{k}.") for k in range(3)] == [{0.005}, {0.05}, {0.5}]
    assert of("image_encoder.model.embeddings") == {0.0005}
    assert of("image_encoder.model.layernorm") == {0.5}


def test_each_group_of_the_optimiser_has_the_rate_of_its_layers():
    one = method()
    step = step_of(one, layer_decay=0.5, encoder_rate=0.2)
    run(step, 0, 1)
    found = {round(group["lr"] / 0.01, 9): len(group["params"]) for group in step.optimizer.param_groups}
    assert sorted(found) == [0.025, 0.05, 0.1, 0.2, 1.0]
    learned = [weight for weight in one.parameters() if weight.requires_grad]
    assert sum(len(group["params"]) for group in step.optimizer.param_groups) == len(learned)


def test_the_first_step_of_adam_is_as_long_as_the_rate_of_the_layer():
    """Adam's first step is lr for every weight with a gradient, whatever its size: a check by hand of what the groups do."""
    one = method()
    before = {name: weight.detach().clone() for name, weight in one.named_parameters()}
    run(step_of(one, layer_decay=0.5, optimizer="adam", weight_decay=0.0, clip_norm=None), 0, 1)
    moves = {name: (weight.detach() - before[name]).abs().max().item() for name, weight in one.named_parameters()}
    for k in range(3):
        (name,) = [n for n in moves if n.endswith(f"text_encoder.model.encoder.layer.{k}.output.dense.weight")]
        assert moves[name] == pytest.approx(0.01 * 0.5 ** (2 - k), rel=1e-3)
    assert moves["matcher.text_linear.weight"] == pytest.approx(0.01, rel=1e-3)


def test_unset_keys_leave_the_groups_as_they_were():
    step = step_of(method())
    assert [group["weight_decay"] for group in step.optimizer.param_groups] == [0.01, 0.0]
    assert not any("scale" in group for group in step.optimizer.param_groups)


def test_an_epoch_of_unfreezing_becomes_its_first_step():
    assert in_steps(Train(freeze=["text"], unfreeze_epoch=2), 7).unfreeze_step == 14
    assert in_steps(Train(freeze=["text"]), 7).unfreeze_step is None


@pytest.mark.parametrize("name", ["clip", "scan"])
def test_other_matchers_have_encoders_to_freeze_too(name: str):
    torch.manual_seed(2)
    one = Matching(matcher_of(name), loss="contrastive")
    text = weights(one, "text")
    run(step_of(one, freeze=["text"]), 0, 2)
    assert text
    assert not moved(text, weights(one, "text"))


@pytest.mark.parametrize(
    ("name", "options", "choices", "reason"),
    [
        ("uniter", {}, {"freeze": ["image"]}, "which 'uniter' does not have"),
        ("dual", {"text": HF_TEXT, "image": {"kind": "conv", "image_size": 16}}, {"layer_decay": 0.9}, None),
        ("dual", {"image": {"kind": "conv", "image_size": 16}}, {"layer_decay": 0.9}, "this model has none"),
        ("dual", {"image": {**HF_IMAGE, "freeze": True}}, {"freeze": ["image"], "unfreeze_step": 3}, "freeze: true in the model"),
    ],
)
def test_what_cannot_be_frozen_is_refused(name: str, options: dict[str, Any], choices: dict[str, Any], reason: str | None):
    one = Matching(matcher_of(name, **options))
    if reason is None:
        assert math.isfinite(step_of(one, **choices).optimizer.param_groups[0]["lr"])
        return
    with pytest.raises(ValueError, match=reason):
        step_of(one, **choices)


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"unfreeze_step": 3}, "need freeze"),
        ({"freeze": ["text"], "unfreeze_step": 3, "unfreeze_epoch": 1}, "give one of them"),
        ({"freeze": ["words"]}, "image"),
    ],
)
def test_contradictions_are_named(choices: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        Train(**choices)
