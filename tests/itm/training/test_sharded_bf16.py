"""train.shard_weights with train.precision=bf16: layers meet bfloat16 weights, while shares, gradients and the optimiser stay float32."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from itm.config import Train
from itm.distributed import rank
from itm.methods.matching import Matching
from itm.training.step import Step
from itm.training.switches import build_step
from tests.support.every_matcher import batch_of, matcher_of
from tests.support.ranks import joined, spawn_ranks

WORLD, STEPS = 2, 3
MATCHERS = ("clip", "scan", "uniter")


def step_of(name: str, shard: bool) -> Step:
    torch.manual_seed(2)
    train = Train(batch_size=6, shard_weights=shard, precision="bf16", ema=0.9, clip_norm=1.0)
    return build_step(Matching(matcher_of(name), loss="triplet", margin=0.5), train, lambda step: 1e-3, seed=1, device=torch.device("cpu"))


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def worker(number: int, port: int, folder: Path) -> None:
    with joined(number, port, WORLD):
        warnings.simplefilter("ignore")
        for name in MATCHERS:
            found = {}
            for shard in (False, True):
                step, met = step_of(name, shard), set()
                for module in step.plain.modules():
                    if isinstance(module, nn.Linear):
                        module.register_forward_pre_hook(lambda m, given, met=met: met.add(m.weight.dtype))
                losses = [float(step([batch_of(6 + rank())], 0)["loss"])]
                gradient = torch.cat([whole(p.grad).flatten() for p in step.plain.parameters() if p.grad is not None])
                losses += [float(step([batch_of(6 + rank() + 2 * k)], k)["loss"]) for k in range(1, STEPS)]
                kept = {p.dtype for p in step.plain.parameters()} | {p.grad.dtype for p in step.plain.parameters() if p.grad is not None}
                kept |= {v.dtype for state in step.optimizer.state.values() for v in state.values()}
                found[shard] = losses, met, kept, gradient
            torch.save(found, folder / f"{name}-{number}.pt")


@pytest.mark.e2e
def test_sharded_bf16_gathers_in_bf16_keeps_fp32_and_trains_as_ddp_in_bf16(tmp_path: Path) -> None:
    spawn_ranks(worker, WORLD, tmp_path)
    for name in MATCHERS:
        for number in range(WORLD):
            found = torch.load(tmp_path / f"{name}-{number}.pt")
            (wanted, of_ddp, _, gradient), (losses, met, kept, sharded) = found[False], found[True]
            assert of_ddp == {torch.float32} and met == {torch.bfloat16}, name
            assert kept == {torch.float32}, name
            assert losses == pytest.approx(wanted, rel=0.02), name
            assert torch.cosine_similarity(sharded, gradient, 0) > 0.95, name
            assert float(sharded.norm()) == pytest.approx(float(gradient.norm()), rel=0.1), name
