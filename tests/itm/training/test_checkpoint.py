from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from itm.config import Train
from itm.data.plan import Position
from itm.training.checkpoint import Best, State, best_uri, latest, load_checkpoint, save_checkpoint, write_weights
from itm.training.loop import train_loop
from tests.support.tiny_steps import batches, silent, stepper, weights


def state(step: int, **more: object) -> State:
    return State(Position(step, 0, step * 4), f"digest-{step}", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("killed_at", [1, 3, 6])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path: Path, killed_at: int, ema: float | None) -> None:
    train = Train(lr=0.05, ema=ema)
    whole = stepper(train)
    train_loop(whole, batches(0, 7), 0, 7, silent())
    first = stepper(train)
    train_loop(first, batches(0, killed_at), 0, killed_at, silent())
    save_checkpoint(str(tmp_path), state(killed_at), first)
    torch.rand(5)
    second = stepper(train, seed=0)
    nn.init.zeros_(second.plain.image.weight)  # type: ignore[union-attr,arg-type]
    found = latest(str(tmp_path))
    assert found is not None
    load_checkpoint(str(tmp_path), found, second)
    train_loop(second, batches(found.position.step, 7), found.position.step, 7, silent())
    assert torch.equal(weights(whole), weights(second))
    if whole.average is not None and second.average is not None:
        for a, b in zip(whole.average.module.parameters(), second.average.module.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_state_comes_back_whole(tmp_path: Path) -> None:
    best = Best(2, {"rsum": 1.5})
    said = state(4, best=best, seconds=3.5, pairs=16, losses=({"step": 2, "loss": 0.5},))
    save_checkpoint(str(tmp_path), said, stepper())
    assert latest(str(tmp_path)) == said


def test_a_checkpoint_without_its_json_does_not_exist(tmp_path: Path) -> None:
    step = stepper()
    assert latest(str(tmp_path)) is None
    save_checkpoint(str(tmp_path), state(1), step)
    save_checkpoint(str(tmp_path), state(2), step)
    (tmp_path / "000000002.json").unlink()
    found = latest(str(tmp_path))
    assert found is not None
    assert found.position.step == 1


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    step, root = stepper(), str(tmp_path)
    for number in range(1, 5):
        best = Best(min(number, 2), {"rsum": 1.0})
        if number <= 2:
            write_weights(best_uri(root, best), step.plain)
        save_checkpoint(root, state(number, best=best), step)
    assert sorted({p.name.split(".")[0] for p in tmp_path.iterdir()}) == ["000000003", "000000004", "best-000000002"]


def test_weights_of_another_model_are_refused_with_the_remedy(tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path), state(1), stepper())
    other = stepper()
    other.plain.image = nn.Linear(12, 5)
    with pytest.raises(ValueError, match=r"(?s)000000001\.model\.safetensors does not fit.*--overwrite"):
        load_checkpoint(str(tmp_path), state(1), other)


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one_in_force(tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path), state(1), stepper())
    obstacle = tmp_path / "000000002.optimizer.pt"
    obstacle.mkdir()
    (obstacle / "in the way").touch()
    with pytest.raises(OSError, match=r"000000002\.optimizer\.pt"):
        save_checkpoint(str(tmp_path), state(2), stepper())
    found = latest(str(tmp_path))
    assert found is not None
    assert found.position.step == 1
