from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from itm.config import Train
from itm.training.loop import Hooks, train_loop
from itm.types import Batch, Captions, Images
from tests.support.tiny_steps import batch, batches, silent, stepper, weights


def test_the_loop_sums_the_named_losses_and_calls_the_hooks_in_time() -> None:
    said: list[Any] = []
    hooks = Hooks(
        log=lambda done, values: said.append(("log", done, values)),
        validate=lambda done: said.append(("validate", done)),
        checkpoint=lambda done: said.append(("checkpoint", done)),
        logs=lambda done: done % 2 == 0,
        validates=lambda done: done == 4,
        checkpoints=lambda done: done == 4,
    )
    train_loop(stepper(), batches(0, 5), 0, 5, hooks)
    assert [(s[0], s[1]) for s in said] == [("log", 2), ("log", 4), ("validate", 4), ("checkpoint", 4)]
    values = said[0][2]
    assert set(values) == {"pull", "norm", "loss"}
    assert values["loss"] == pytest.approx(values["pull"] + values["norm"])


def test_accumulation_equals_one_larger_batch() -> None:
    small = [batch(1), batch(2)]
    joined = Batch(Images.cat([b.images for b in small]), Captions.cat([b.captions for b in small]))
    twice, once = stepper(Train(lr=0.01, accumulate=2), drop=0.0), stepper(drop=0.0)
    train_loop(twice, iter(small), 0, 1, silent())
    train_loop(once, iter([joined]), 0, 1, silent())
    torch.testing.assert_close(weights(twice), weights(once), rtol=1e-5, atol=1e-6)


def test_a_step_is_a_function_of_its_number_and_not_of_what_ran_before() -> None:
    first, second = stepper(), stepper()
    torch.rand(17)  # whatever else draws random numbers
    a = first([batch(3)], 5)
    torch.rand(1)
    b = second([batch(3)], 5)
    assert torch.equal(a["loss"], b["loss"])
    assert torch.equal(weights(first), weights(second))


def test_the_gradient_is_clipped_to_its_norm() -> None:
    step = stepper(Train(lr=0.01, clip_norm=1e-3))
    step([batch(0)], 0)
    norm = torch.cat([p.grad.flatten() for p in step.plain.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_the_moving_average_equals_the_hand_recurrence() -> None:
    step = stepper(Train(lr=0.05, ema=0.9))
    average: Tensor | None = None
    for number in range(4):
        step([batch(number)], number)
        now = weights(step).clone()
        average = now if average is None else 0.9 * average + 0.1 * now
    assert step.average is not None
    kept = torch.cat([p.detach().flatten() for p in step.average.module.parameters()])
    torch.testing.assert_close(kept, average)


def test_bf16_trains_close_to_fp32() -> None:
    exact, rounded = stepper(drop=0.0), stepper(Train(lr=0.01, precision="bf16"), drop=0.0)
    a, b = exact([batch(0)], 0), rounded([batch(0)], 0)
    assert b["loss"].dtype == torch.float32
    torch.testing.assert_close(a["loss"], b["loss"], rtol=2e-2, atol=1e-2)


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved() -> None:
    step = stepper()
    with torch.no_grad():
        step.plain.tau.fill_(float("nan"))  # type: ignore[operator,union-attr]
    saved: list[int] = []
    with pytest.raises(ValueError, match=r"not finite at step 1.*train\.lr"):
        train_loop(step, batches(0, 3), 0, 3, silent(checkpoint=saved.append, checkpoints=lambda done: True))
    assert not saved


def test_data_that_end_early_are_an_error_with_the_step() -> None:
    with pytest.raises(ValueError, match="ended at step 2 of 5"):
        train_loop(stepper(), batches(0, 2), 0, 5, silent())


def test_a_run_that_ends_early_logs_validates_and_checkpoints_its_last_step() -> None:
    said: list[tuple[str, int]] = []

    def run(**given: Any) -> int:
        said.clear()
        hooks = Hooks(
            log=lambda done, values: said.append(("log", done)),
            validate=lambda done: said.append(("validate", done)),
            checkpoint=lambda done: said.append(("checkpoint", done)),
            **given,
        )
        return train_loop(stepper(), batches(0, 5), 0, 5, hooks)

    assert run(ends=lambda done: done == 3) == 3
    assert said == [("log", 3), ("validate", 3), ("checkpoint", 3)]
    assert run(validates=lambda done: done % 2 == 0, ends=lambda done: ("validate", 4) in said) == 4
    assert said == [("validate", 2), ("validate", 4), ("checkpoint", 4)]
    assert run() == 5
