"""A training in the folder of an earlier one: the same, longer, or another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from itm.config import overridden
from itm.data import files
from itm.training.step import Step
from pipelines.training.driver import finished, train
from tests.support.noise_split import small_split
from tests.support.small_training import die_at, final, recipe, same, splits

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def _packed(registry: Path, tmp_path: Path) -> None:
    splits(tmp_path)


def steps(root: Path, name: str = "run") -> list[int]:
    return [json.loads(line)["step"] for line in (root / "runs" / name / "losses.jsonl").open()]


def test_more_steps_go_on_from_the_last_checkpoint_and_end_where_one_run_would(tmp_path: Path) -> None:
    constant = {"schedule": "constant"}
    train(recipe(tmp_path, steps=10, name="whole", **constant))
    short = train(recipe(tmp_path, steps=6, **constant))
    assert finished(recipe(tmp_path, steps=10, **constant)) is None
    done = train(recipe(tmp_path, steps=10, **constant))
    assert (done["run_id"], done["steps"]) == (short["run_id"], 10)
    assert steps(tmp_path) == list(range(1, 11))
    assert same(final(tmp_path, "run"), final(tmp_path, "whole"))
    assert train(recipe(tmp_path, steps=10, **constant)) == done


def test_more_epochs_go_on_too_and_fewer_steps_are_refused_with_both_numbers(tmp_path: Path) -> None:
    first = train(recipe(tmp_path, steps=None, epochs=1))
    done = train(recipe(tmp_path, steps=None, epochs=2))
    assert done["steps"] == 2 * first["steps"]
    with pytest.raises(ValueError, match=f"has {done['steps']} steps behind it, this recipe ends at {first['steps']}"):
        train(recipe(tmp_path, steps=None, epochs=1))
    assert finished(recipe(tmp_path, steps=None, epochs=2)) == done


def test_a_lengthened_run_that_is_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(recipe(tmp_path, steps=4))
    with monkeypatch.context() as patch:
        die_at(7, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(tmp_path, steps=10))
    assert train(recipe(tmp_path, steps=10))["steps"] == 10
    assert steps(tmp_path) == list(range(1, 11))


def test_what_is_read_after_the_training_makes_no_other_run(tmp_path: Path) -> None:
    done = train(recipe(tmp_path, steps=2))
    later = overridden(recipe(tmp_path, steps=2), ["registry.metric=t2i_r1", "evaluation.protocol=i2i", "data.test_split=val"])
    assert train(later) == done


def test_other_shards_are_named_as_such(tmp_path: Path) -> None:
    train(recipe(tmp_path, steps=2))
    small_split(tmp_path / "shards", "train", shards=4)
    with pytest.raises(ValueError, match=r"holds a run on other shards: .*--overwrite"):
        train(recipe(tmp_path, steps=2))


def test_a_failed_start_stands_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recipe(tmp_path).folder
    other = train(recipe(tmp_path, steps=2, name="other"))["matcher"]
    with pytest.raises(ValueError, match="does not fit model"):
        wrong = recipe(tmp_path, steps=2, start=other).model_dump(mode="json")
        wrong["model"]["options"]["width"] = 4
        train(recipe(tmp_path, steps=2, start=other).model_copy(update={"model": recipe(tmp_path).model.model_validate(wrong["model"])}))
    assert not files.exists(f"{folder}/start/config.json")

    def fail(*_: object) -> None:
        raise RuntimeError("the first batch does not fit")

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", fail)
        with pytest.raises(RuntimeError, match="first batch"):
            train(recipe(tmp_path, steps=2))
    assert train(recipe(tmp_path, steps=2, lr=0.5))["steps"] == 2
