"""Two real processes (gloo) that do not gather: UARDA's thresholds follow the samples of both, also where encoders run in chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from itm.matchers.late.uarda import UARDA
from itm.matchers.late.uarda_separation import samples
from itm.matchers.late.uarda_threshold import RelevanceThreshold
from itm.methods.matching import Matching
from itm.types import Batch
from tests.support.late_worlds import SMALL, captions_of, images_of
from tests.support.ranks import joined, spawn_ranks

WORLD, ROWS = 2, 9
CHUNKS = (None, 4)
WORDS = [5, 3, 6, 4, 5, 2, 6, 3, 5]


def batch(rank: int) -> Batch:
    """Other pairs on each rank; regions of one image are near the words of its caption often enough to be ranked first."""
    torch.manual_seed(10 + rank)
    return Batch(images_of(ROWS, 4), captions_of(WORDS))


def matcher() -> UARDA:
    torch.manual_seed(2)
    return UARDA(**SMALL, direction="both", threshold={"min_words": 4, "mismatch": "hardest", "kappa": 0.0}).double().train()


def states(own: UARDA) -> dict[str, Tensor]:
    return {name: value.double() for name, value in own.thresholds.state_dict().items() if "pruned" not in name}


def worker(rank: int, port: int, folder: Path) -> None:
    with joined(rank, port, WORLD):
        found = {}
        for chunk in CHUNKS:
            own = matcher()
            method = DistributedDataParallel(Matching(own, loss="triplet"), find_unused_parameters=True)
            torch.stack(list(method(batch(rank), chunk=chunk).values())).sum().backward()
            found[chunk] = states(own)
        torch.save(found, folder / f"{rank}.pt")


def of_one_rank() -> dict[str, Tensor]:
    """What one process makes of the samples of both batches together."""
    own, seen = matcher(), []
    for rank in range(WORLD):
        given = batch(rank)
        own.score(own.encode_images(given.images), own.encode_captions(given.captions))
        positives = torch.eye(ROWS, dtype=torch.bool)
        seen.append({direction: samples(found, positives, "hardest", 0) for direction, found in own.observed.items()})
    for direction, state in own.thresholds.items():
        assert isinstance(state, RelevanceThreshold)
        matched, mismatched = (torch.cat([half[direction][side] for half in seen]).detach() for side in (0, 1))
        assert len({len(half[direction][0]) for half in seen}) > 1, "the ranks bring unequal shares, or a missing sum could hide"
        state.update(matched, mismatched, everywhere=True)
    return states(own)


@pytest.mark.e2e
def test_two_ranks_without_gather_move_the_thresholds_as_one_does_with_the_samples_of_both(tmp_path: Path):
    spawn_ranks(worker, WORLD, tmp_path)
    wanted = of_one_rank()
    assert all(int(value) == 1 for name, value in wanted.items() if name.endswith("updates"))
    for rank in range(WORLD):
        for chunk, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                torch.testing.assert_close(found[name], value, atol=1e-12, rtol=1e-10, msg=lambda m, n=(rank, chunk, name): f"{n}: {m}")
