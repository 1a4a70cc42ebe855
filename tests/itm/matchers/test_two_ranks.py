"""Real matchers on two processes (gloo) that gather equal one process on the whole batch: losses, gradients, running statistics.

So with `gather` the batch norm of SGR and SAF and UARDA's thresholds see the block of all ranks; without it each rank's own block. The
convolutions of `dual` normalise before anything is gathered, hence over their own rank's images: that one cannot be equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from itm.methods.matching import Matching
from itm.types import Batch
from tests.support.every_matcher import captions_of, images_of, matcher_of
from tests.support.ranks import joined, spawn_ranks

NAMES = ["vse", "scan", "sgr", "saf", "uarda"]
WORLD, ROWS = 2, 3


def batch() -> Batch:
    return Batch(images_of(WORLD * ROWS), captions_of([7, 4, 5, 3, 6, 5]))


def method(name: str, gather: bool) -> Matching:
    torch.manual_seed(2)
    matcher = matcher_of(name).double()
    for module in matcher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Matching(matcher, loss="triplet", margin=0.5, gather=gather).train()


def run(module: nn.Module, given: Batch) -> tuple[float, dict[str, Tensor]]:
    loss = torch.stack(list(module(given).values())).sum()
    loss.backward()
    plain: Any = getattr(module, "module", module)
    found = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    return loss.item(), found | {name: b.double() for name, b in plain.named_buffers() if "flat" not in name and "normalise" not in name}


def worker(rank: int, port: int, folder: Path) -> None:
    with joined(rank, port, WORLD):
        whole, own = batch(), slice(rank * ROWS, (rank + 1) * ROWS)
        mine = Batch(whole.images[own], whole.captions[own])
        got = {name: run(DistributedDataParallel(method(name, True), find_unused_parameters=True), mine) for name in NAMES}
        torch.save(got, folder / f"{rank}.pt")


@pytest.mark.e2e
def test_two_gathering_ranks_equal_one_process(tmp_path: Path):
    spawn_ranks(worker, WORLD, tmp_path)
    for name in NAMES:
        want_loss, want = run(method(name, False), batch())
        for rank in range(WORLD):
            loss, found = torch.load(tmp_path / f"{rank}.pt")[name]
            assert loss == pytest.approx(want_loss, abs=1e-10), (name, rank)
            assert found.keys() == want.keys()
            for key, value in want.items():
                torch.testing.assert_close(found[key], value, atol=1e-10, rtol=1e-8, msg=f"{name} {key}")
        if name == "saf":
            assert {key.rsplit(".", 1)[1] for key in want} >= {"running_mean", "running_var", "num_batches_tracked"}
