"""The step of a recipe: DDP or FSDP2 around the method, recomputation, compilation, moving average, in an order that suits them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from itm.config import Train
from itm.distributed import world_size
from itm.training.compiled import check_compiler, compile_encoders
from itm.training.freezing import freeze
from itm.training.optim import build_optimizer, moving_average
from itm.training.ranked import RankedStep
from itm.training.recompute import recompute_activations
from itm.training.step import Step
from itm.types import Method


def build_step(method: Method, train: Train, rate: Callable[[int], float], seed: int, device: torch.device) -> Step:
    """method: fresh, on the CPU, the same on all ranks. Raises ValueError for what this machine cannot do."""
    freeze(method.matcher, train)
    method.hardest_pairs = train.hardest_pairs == "auto"
    sharded = train.shard_weights and world_size() > 1
    if train.compile:
        check_compiler(device)
    run_again = recompute_activations(method.matcher) if train.checkpoint_activations else set()
    if sharded:
        from itm.training.sharding import ShardedStep  # its imports take half a second

        step: Step = ShardedStep(method, train, rate, seed, device)
    else:
        method.to(device)
        average = moving_average(method, train.ema) if train.ema else None
        of_ranks = RankedStep if world_size() > 1 else Step
        step = of_ranks(method, build_optimizer(method, train), train, rate, average, seed)
    if train.compile:
        compile_encoders(method.matcher, run_again)
    return step
