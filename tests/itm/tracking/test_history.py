"""What the tracking server tells the report of a run: its validations in order, and the versions that came of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from itm.tracking.history import History, history_of
from itm.tracking.registry import promote
from itm.tracking.runs import Tracker
from tests.support.registry_world import matcher_folder, register_matcher

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("group", ["val_", "val/"])
def test_validations_come_by_step_and_a_step_taken_twice_counts_once(registry: Path, group: str):
    with Tracker.start("tests", "run") as tracker:
        for step, rsum in ((20, 150.0), (10, 90.0), (20, 140.0)):
            tracker.metrics({f"{group}rsum": rsum, f"{group}t2i_r1": rsum / 10, f"{group}t2i_medr": 3.0, "loss": 1.0}, step=step)
            tracker.flush()
    found = history_of(tracker.run_id)
    assert found == History([{"step": 10, "rsum": 90.0, "t2i_r1": 9.0}, {"step": 20, "rsum": 140.0, "t2i_r1": 14.0}], [])


def test_versions_of_the_run_come_with_their_aliases_and_those_of_other_runs_do_not(registry: Path, tmp_path: Path):
    with Tracker.start("tests", "first") as first, Tracker.start("tests", "second") as second:
        for seed, tracker in ((1, first), (2, second), (3, first)):
            version = register_matcher(matcher_folder(tmp_path / str(seed), seed), "tiny", tracker.run_id, {})
            promote("tiny", version, "rsum", 100.0 - seed)
    found = history_of(first.run_id)
    assert found is not None and found.versions == ["tiny version 1 (champion)", "tiny version 3 (candidate)"]


def test_a_run_that_the_server_does_not_know_has_no_history(registry: Path):
    assert history_of("0" * 32) is None
