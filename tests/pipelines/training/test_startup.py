from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipelines.train import train
from pipelines.training.startup import StartUp
from tests.support.small_training import die_at, recipe, splits

pytest_plugins = ["tests.support.registry_fixtures"]


def test_parts_follow_each_other_and_add_up_to_the_time_since_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([103.0, 104.5, 106.0, 105.0])  # the last one by a machine whose clock is behind
    monkeypatch.setattr("time.time", lambda: next(clock))
    startup = StartUp(began=100.0)
    for part in ("imports", "checks", "checks", "workers"):
        startup.reached(part)
    assert startup.parts == {"imports": 3.0, "checks": 3.0, "workers": 0.0}
    assert str(startup) == "first step after 6.0 s: imports 3.0, checks 3.0, workers 0.0"


def test_a_training_says_after_its_first_step_where_the_time_went_and_one_that_goes_on_does_not(
    tmp_path: Path, registry: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    splits(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(5, patch)
        train(recipe(tmp_path))
    [line] = re.findall(r"first step after .*", "".join(capfd.readouterr()))
    assert re.findall(r"[a-zA-Z]+(?= \d+\.\d)", line.partition(": ")[2]) == ["imports", "checks", "MLflow", "model", "data", "step"]
    train(recipe(tmp_path))
    assert "first step after" not in "".join(capfd.readouterr())
