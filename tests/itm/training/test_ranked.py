"""DDP that looks for parameters without gradient only where a method leaves some: every method trains as one that always looks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from itm.config import Train
from itm.distributed import rank
from itm.methods.cusa import CUSA
from itm.methods.iais import IAIS
from itm.methods.matching import Matching
from itm.training.optim import build_optimizer
from itm.training.ranked import reached, steady
from itm.training.step import Step
from itm.training.switches import build_step
from itm.types import Batch, SoftLabels
from tests.support.every_matcher import batch_of, captions_of, images_of, matcher_of
from tests.support.joint_matcher import Crossed
from tests.support.ranks import joined, spawn_ranks

ROWS, WORLD, STEPS = 6, 2, 3
USA_ALONE = {"itc": False, "csa": False, "usa": {"teacher": 1.0}}
# A method of two ranks, its settings, and whether it leaves parameters without gradient: heads and layers that its losses do not read.
METHODS: dict[str, tuple[Callable[[], Any], dict[str, Any], bool]] = {
    "contrastive on clip with uni heads": (lambda: Matching(matcher_of("clip")), {"accumulate": 2}, True),
    "cusa on clip": (lambda: CUSA(matcher_of("clip"), gather=True), {"accumulate": 2, "ema": 0.9}, False),
    "usa alone on sgr": (lambda: CUSA(matcher_of("sgr"), **USA_ALONE), {"accumulate": 2}, True),
    "triplet on saf": (lambda: Matching(matcher_of("saf"), loss="triplet"), {"checkpoint_activations": True, "cache_chunk": 4}, False),
    "triplet on uarda": (lambda: Matching(matcher_of("uarda"), loss="triplet"), {"cache_chunk": 4}, False),
    "iais on uniter": (lambda: IAIS(matcher_of("uniter"), ranking={"hard_negatives": 2}), {"accumulate": 2}, False),
    "iais on scan": (lambda: IAIS(matcher_of("scan")), {"clip_norm": 0.1}, False),
}


def of_rank(seed: int) -> Batch:
    noise = torch.Generator().manual_seed(seed)
    labels = SoftLabels(torch.randn(ROWS, 7, generator=noise), torch.randn(ROWS, 9, generator=noise))
    return Batch(images_of(ROWS + seed)[:ROWS], captions_of([3 + (seed * j) % 8 for j in range(ROWS)]), labels)


def trained(step: Step) -> tuple[list[float], list[Tensor]]:
    """Losses and weights of a few steps on batches that differ between ranks."""
    losses = []
    for number in range(STEPS):
        micro = [of_rank(1 + rank() + WORLD * (k + 2 * number)) for k in range(step.train.accumulate)]
        losses.append(float(step(micro, number)["loss"]))
    return losses, [p.detach().clone() for p in step.plain.parameters()] + [b.clone() for b in step.plain.buffers()]


def worker(number: int, port: int, folder: Path) -> None:
    with joined(number, port, WORLD):
        warnings.simplefilter("ignore")
        for name, (make, settings, _) in METHODS.items():
            train = Train(batch_size=ROWS, lr=0.01, **settings)
            torch.manual_seed(2)
            method = make()
            always = copy.deepcopy(method)
            step = build_step(method, train, lambda step: 0.01, seed=1, device=torch.device("cpu"))
            found = trained(step)
            assert isinstance(step.method, DistributedDataParallel)
            looks = step.method.find_unused_parameters
            looking = DistributedDataParallel(always, find_unused_parameters=True)
            wanted = trained(Step(looking, build_optimizer(always, train), train, lambda step: 0.01, None, 1))
            torch.save((looks, found, wanted), folder / f"{name}-{number}.pt")


@pytest.mark.e2e
def test_every_method_trains_on_two_ranks_as_one_that_always_looks_for_unused_parameters(tmp_path: Path) -> None:
    spawn_ranks(worker, WORLD, tmp_path)
    for name, (make, _, leaves_some) in METHODS.items():
        ends = []
        for number in range(WORLD):
            looks, (losses, weights), (wanted_losses, wanted) = torch.load(tmp_path / f"{name}-{number}.pt")
            assert looks is leaves_some, name
            assert losses == wanted_losses, name
            assert all(torch.equal(x, y) for x, y in zip(weights, wanted, strict=True)), name
            ends.append(weights[: len(list(make().parameters()))])
        assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True)), f"{name}: the ranks' weights are apart"


@pytest.mark.parametrize("name", METHODS)
def test_the_graph_tells_which_parameters_get_a_gradient(name: str) -> None:
    method = METHODS[name][0]().train()
    losses = method(batch_of(ROWS))
    found = {id(p) for p in reached(losses.values())}
    torch.stack(list(losses.values())).sum().backward()
    assert found == {id(p) for p in method.parameters() if p.grad is not None}


def test_a_part_of_ones_own_is_always_looked_through() -> None:
    assert steady(Matching(matcher_of("clip")))
    assert not steady(Matching(Crossed(vocab_size=9)))
