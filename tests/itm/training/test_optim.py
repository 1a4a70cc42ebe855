from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from itm.config import Train
from itm.matchers.late.uarda_threshold import RelevanceThreshold, ThresholdOptions
from itm.training.optim import build_optimizer, learning_rate, parameter_groups, scalars
from tests.support import GOLDEN

SCHEDULE = json.loads((GOLDEN / "cusa/schedule/lr_schedule.json").read_text())


@pytest.mark.parametrize("epochs", sorted(SCHEDULE, key=int))
def test_cosine_by_epoch_equals_the_official_scheduler(epochs: str) -> None:
    train = Train(schedule="cosine_epoch", lr=1e-5, min_lr=1e-6)
    per_epoch, total = 7, 7 * int(epochs)
    for epoch, rate in enumerate(SCHEDULE[epochs]):
        inside = {learning_rate(train, step, per_epoch, total) for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)}
        assert len(inside) == 1
        assert inside.pop() == pytest.approx(rate, rel=1e-9)


def test_the_rate_warms_up_then_falls_to_its_floor() -> None:
    train = Train(schedule="cosine", lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(train, step, 10, 24) for step in range(25)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[14] == pytest.approx(0.55)
    assert rates[24] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_linear_schedule_is_uniters_update_by_update() -> None:
    """The authors count updates from 1: rate t/W below W, then rate (T-t)/(T-W), and 1e-8 from T on."""
    golden = GOLDEN / "iais/p6_schedules"
    config = json.loads((golden / "README.json").read_text())["config"]
    train = Train(schedule="linear", lr=config["learning_rate"], warmup_steps=config["warmup_steps"])
    with np.load(golden / "data.npz") as data:
        for update, rate in zip(data["step"].tolist(), data["lr"].tolist(), strict=True):
            assert learning_rate(train, update - 1, 10, config["num_train_steps"]) == pytest.approx(rate, rel=1e-12)


def test_linear_and_step_schedules_equal_hand_values() -> None:
    linear = Train(schedule="linear", lr=1.0, min_lr=0.0)
    assert [learning_rate(linear, s, 5, 10) for s in (0, 4, 8, 9)] == pytest.approx([0.9, 0.5, 0.1, 1e-8])
    step = Train(schedule="step", lr=1.0, step_epochs=2, step_gamma=0.1)
    assert [learning_rate(step, s, 5, 50) for s in (0, 9, 10, 19, 20)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert learning_rate(Train(schedule="constant", lr=0.3), 7, 5, 50) == 0.3


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.gru = nn.GRU(2, 2)
        self.tau = nn.Parameter(torch.tensor(0.07))
        self.rule = RelevanceThreshold(ThresholdOptions())
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_temperatures_biases_and_norms_are_not_decayed_and_scalars_are_told() -> None:
    method = Small()
    names = {id(p): name for name, p in method.named_parameters()}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in parameter_groups(method, 0.1))  # type: ignore[attr-defined]
    assert decayed == ["linear.weight", "gru.weight_ih_l0", "gru.weight_hh_l0"]
    assert set(plain) == {"tau", "linear.bias", "norm.weight", "norm.bias", "gru.bias_ih_l0", "gru.bias_hh_l0"}
    told = dict(scalars(method))
    assert told["tau"] == pytest.approx(0.07)
    assert told["rule.t"] == 0.0
    assert set(told) == {"tau", *(f"rule.{name}" for name in method.rule.report())}


@pytest.mark.parametrize("name", ["adam", "adamw", "adamax"])
def test_each_optimiser_takes_the_settings_of_the_recipe(name: str) -> None:
    optimizer = build_optimizer(Small(), Train(optimizer=name, lr=0.5, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1))  # type: ignore[arg-type]
    assert type(optimizer).__name__.lower() == name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}


class Named(nn.Module):
    """Weights named as UNITER and CUSA name theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.tensor(0.05))
        self.LayerNorm = nn.LayerNorm(3)
        self.img_layer_norm = nn.LayerNorm(3)
        self.dense = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("decayed", "names"),
    [
        ("matrices", {"dense.weight"}),
        ("cusa", {"dense.weight", "tau"}),
        ("uniter", {"dense.weight", "tau", "img_layer_norm.weight"}),
    ],
)
def test_which_weights_decay_is_chosen_as_the_authors_chose(decayed: str, names: set[str]) -> None:
    module = Named()
    owners = {id(p): name for name, p in module.named_parameters()}
    with_decay, _ = parameter_groups(module, 0.1, decayed)
    assert {owners[id(p)] for p in with_decay["params"]} == names  # type: ignore[attr-defined]


def test_uniters_adamw_adds_eps_before_the_correction_and_decays_after_the_update() -> None:
    module = nn.Linear(2, 2, bias=False).double()
    weight, first, second = module.weight.detach().clone(), torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
    train = Train(optimizer="adamw_uniter", decayed="uniter", lr=0.1, betas=(0.9, 0.98), eps=1e-2, weight_decay=0.3)
    optimizer = build_optimizer(module, train)
    for step in (1, 2, 3):
        grad = torch.full((2, 2), 0.1 * step).double()
        module.weight.grad = grad.clone()
        optimizer.step()
        first, second = 0.9 * first + 0.1 * grad, 0.98 * second + 0.02 * grad**2
        weight = weight - 0.1 * (1 - 0.98**step) ** 0.5 / (1 - 0.9**step) * first / (second.sqrt() + 1e-2)
        weight = weight - 0.1 * 0.3 * weight
    torch.testing.assert_close(module.weight.detach(), weight, atol=1e-12, rtol=0)
