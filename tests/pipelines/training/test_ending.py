"""A training that ends before its last step: because nothing gets better (patience), or because its hours are over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import itm
from itm.config import overridden
from itm.data import files
from itm.tracking.history import history_of
from itm.training.checkpoint import State, Waiting, latest
from pipelines.training.driver import train
from pipelines.training.ending import metrics_that_rise, waited_for
from tests.support.small_training import die_at, final, recipe, same, splits

pytest_plugins = ["tests.support.registry_fixtures"]

LONG = {"lr": 0.001, "steps": 20, "validate_every": 2, "checkpoint_every": 5, "schedule": "constant"}


def checkpoints(root: Path, name: str = "run") -> list[str]:
    return [files.name_of(uri) for uri in files.list_files(f"{root}/runs/{name}/checkpoints", ".json")]


def expected_end(curve: list[tuple[int, float]], patience: int) -> int:
    """The step of the first validation after which the best one lies `patience` validations back, by the curve of a whole run."""
    values = [value for _, value in curve]
    return next(step for n, (step, _) in enumerate(curve) if n - values.index(max(values[: n + 1])) >= patience)


@pytest.fixture
def curve(tmp_path: Path, registry: Path) -> list[tuple[int, float]]:
    """(step, rSum) of the validations of a run without patience."""
    splits(tmp_path)
    history = history_of(train(recipe(tmp_path, name="whole", **LONG))["run_id"])
    assert history is not None
    return [(int(row["step"]), row["rsum"]) for row in history.validations]


@pytest.mark.e2e
def test_a_run_ends_where_the_curve_of_a_whole_run_has_not_risen_for_its_patience_and_a_longer_one_goes_on(
    tmp_path: Path, curve: list[tuple[int, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    end, later = expected_end(curve, 2), expected_end(curve, 4)
    done = train(recipe(tmp_path, patience=2, **LONG))
    assert done["steps"] == end < later < 20
    assert done["ended"].startswith("rsum has not risen above ")
    assert done["best"]["step"] == end - 4
    assert checkpoints(tmp_path)[-1] == f"{end:09d}.json"
    assert itm.load_matcher(done["matcher"]) is not None
    assert train(recipe(tmp_path, patience=2, **LONG)) == done
    assert "it ended because rsum has not risen" in capsys.readouterr().out
    longer = train(recipe(tmp_path, patience=4, **LONG))
    assert (longer["steps"], longer["run_id"]) == (later, done["run_id"])


@pytest.mark.e2e
def test_the_count_goes_on_where_a_run_is_interrupted_and_one_that_had_ended_takes_no_step(
    tmp_path: Path, curve: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    end, frequent = expected_end(curve, 2), LONG | {"checkpoint_every": 1}
    with monkeypatch.context() as patch:
        die_at(end - 1, patch)  # one of the two validations in vain lies before it
        with pytest.raises(KeyboardInterrupt):
            train(recipe(tmp_path, patience=2, **frequent))
    state = latest(f"{tmp_path}/runs/run/checkpoints")
    assert state is not None and state.waiting is not None and state.waiting.validations == 1
    assert train(recipe(tmp_path, patience=2, **frequent))["steps"] == end
    files.delete(f"{tmp_path}/runs/run/run.json")  # the process was lost after the last checkpoint
    again = train(recipe(tmp_path, patience=2, **frequent))
    assert (again["steps"], checkpoints(tmp_path)[-1]) == (end, f"{end:09d}.json")


@pytest.mark.e2e
def test_hours_that_are_over_end_a_run_with_a_validation_and_a_checkpoint_and_more_hours_go_on(tmp_path: Path, registry: Path) -> None:
    splits(tmp_path)
    train(recipe(tmp_path, name="whole", log_every=3))
    short = train(recipe(tmp_path, max_hours=1e-9, log_every=3))
    assert (short["steps"], short["ended"]) == (3, "train.max_hours=1e-09 are over")
    assert short["best"]["step"] == 3, "validate_every alone would give the first one at 5"
    assert checkpoints(tmp_path)[-1] == "000000003.json"
    whole = train(recipe(tmp_path, max_hours=1.0, log_every=3))
    assert whole["steps"] == 10 and "ended" not in whole
    assert same(final(tmp_path, "run"), final(tmp_path, "whole"))


def test_patience_for_what_validations_do_not_measure_is_refused_before_any_work(tmp_path: Path, registry: Path) -> None:
    splits(tmp_path)
    for override, reason in [
        ("registry.metric=eccv_map_at_r", r"train\.patience watches registry\.metric, and 'eccv_map_at_r' is not what"),
        ("registry.metric=i2t_medr", "i2t_medr"),
        ("data.val_split=''", r"train\.patience counts on validations, and data\.val_split is empty"),
    ]:
        with pytest.raises(ValueError, match=reason):
            train(overridden(recipe(tmp_path, patience=2), [override]))
    assert "i2t_r1" in metrics_that_rise() and "t2i_meanr" not in metrics_that_rise()


def test_a_better_value_or_another_metric_starts_the_count_again(tmp_path: Path) -> None:
    asked = recipe(tmp_path, patience=2)
    once = waited_for(None, asked, {"rsum": 5.0, "i2t_r1": 1.0})
    twice = waited_for(once, asked, {"rsum": 5.0, "i2t_r1": 2.0})
    assert (once, twice) == (Waiting("rsum", 5.0), Waiting("rsum", 5.0, 1))
    assert waited_for(twice, asked, {"rsum": 5.1, "i2t_r1": 2.0}) == Waiting("rsum", 5.1)
    other = overridden(asked, ["registry.metric=i2t_r1"])
    assert waited_for(twice, other, {"rsum": 5.0, "i2t_r1": 2.0}) == Waiting("i2t_r1", 2.0)
    assert waited_for(twice, recipe(tmp_path), {"rsum": 5.0}) is None


def test_checkpoints_of_runs_without_patience_are_of_the_format_of_before() -> None:
    from itm.data.plan import Position

    plain = State(Position(), "0")
    assert json.loads(plain.to_json())["format"] == 1 and "waiting" not in json.loads(plain.to_json())
    waiting = State(Position(), "0", waiting=Waiting("rsum", 1.5, 2))
    assert json.loads(waiting.to_json())["format"] == 2
    assert State.from_json(waiting.to_json()) == waiting
