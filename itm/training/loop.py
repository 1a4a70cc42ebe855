"""The training loop: any iterable of `Batch`, any hooks. No Ray, no tracking, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from itm.distributed import all_reduce_sum, world_size
from itm.training.step import Step
from itm.types import Batch


def _nothing(step: int) -> None:
    pass


def _never(step: int) -> bool:
    return False


@dataclass(frozen=True)
class Hooks:
    """Called with the number of steps done, on every rank, in this order: log (with the mean losses of all ranks), validate, checkpoint.

    The predicates say when; they must agree on all ranks, since each step is a meeting of the ranks. ends: whether the run ends after this
    step; asked before the moments of a step, all of which then come, and once more after a validation.
    """

    log: Callable[[int, dict[str, float]], None]
    validate: Callable[[int], None] = _nothing
    checkpoint: Callable[[int], None] = _nothing
    logs: Callable[[int], bool] = _never
    validates: Callable[[int], bool] = _never
    checkpoints: Callable[[int], bool] = _never
    ends: Callable[[int], bool] = _never


def train_loop(step: Step, batches: Iterable[Batch], first: int, last: int, hooks: Hooks) -> int:
    """Optimiser steps [first, last), fewer where `hooks.ends` says so; each takes `train.accumulate` batches. Returns the steps done.

    Raises ValueError when the batches end early, and when a loss is not finite at a logged step (nothing is saved after that).
    """
    stream = iter(batches)
    for number in range(first, last):
        micro = list(islice(stream, step.train.accumulate))
        if len(micro) < step.train.accumulate:
            raise ValueError(f"the data ended at step {number} of {last}")
        losses = step(micro, number)
        done = number + 1
        ended = hooks.ends(done)
        if ended or hooks.logs(done) or hooks.validates(done) or hooks.checkpoints(done):
            values = over_ranks(losses)
            if not torch.tensor(list(values.values())).isfinite().all():
                raise ValueError(f"a loss is not finite at step {done}: {values}; lower train.lr or set train.clip_norm")
            if ended or hooks.logs(done):
                hooks.log(done, values)
        if ended or hooks.validates(done):
            hooks.validate(done)
            ended = ended or hooks.ends(done)
        if ended or hooks.checkpoints(done):
            hooks.checkpoint(done)
        if ended:
            return done
    return last


def over_ranks(losses: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each loss over ranks."""
    mean = all_reduce_sum(torch.stack(list(losses.values()))) / world_size()
    return dict(zip(losses, mean.tolist(), strict=True))
