"""A sweep of eight trials on a local Ray, killed in the middle and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from itm.config import load_recipe
from itm.tracking.runs import client
from pipelines.training.driver import train
from tests.support.small_training import recipe, splits

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e

SPACES = ["train.lr=log(1e-6,1e-2)", "model.options.width=choice(8,16)"]


def started(path: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipelines.sweep", "-c", str(path), "--space", *SPACES, "--trials", "8", "--at-once", "2"]
    return subprocess.Popen(command, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True)


def done_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for name in ("run.json", "stopped.json") for path in folder.glob(f"run-*/{name}")}


def test_eight_trials_killed_in_the_middle_go_on_and_the_winner_can_be_trained_by_its_recipe(registry: Path, tmp_path: Path) -> None:
    splits(tmp_path)
    small = recipe(tmp_path, steps=18, validate_every=2, checkpoint_every=2, log_every=6)
    (tmp_path / "r.json").write_text(small.model_dump_json(exclude_unset=True))
    folder, log = tmp_path / "runs/run/sweep", tmp_path / "log"
    first = started(tmp_path / "r.json", log)
    deadline = time.monotonic() + 200
    while len(done_in(folder)) < 3:
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = done_in(folder)
    assert 3 <= len(before) < 8 and not (folder / "best.yaml").exists()
    assert started(tmp_path / "r.json", log).wait(300) == 0, log.read_text()

    said = json.loads((folder / "sweep.json").read_text())
    after = done_in(folder)
    assert {path: after[path] for path in before} == before, "what was done stays as it was"
    assert [row["state"] in ("finished", "stopped") for row in said["trials"]] == [True] * 8, said
    states = {row["state"] for row in said["trials"]}
    assert states == {"finished", "stopped"}, "learning rates of 1e-6 and 1e-2 are not equally good"
    check_reports(folder, said)
    check_tracking(said)

    won = load_recipe(folder / "best.yaml")
    best = said["trials"][said["best"]]
    assert (won.train.lr, won.model.options["width"]) == tuple(best["choices"].values())
    rows = [json.loads(line) for line in (Path(best["folder"]) / "reports.jsonl").read_text().splitlines()]
    ours = train(won)
    curve = {point.step: point.value for point in client().get_metric_history(ours["run_id"], "val/rsum")}
    assert curve == {row["step"]: row["value"] for row in rows}, "the trial and the training by its recipe are the same training"
    assert best["value"] == max(curve.values()) == max(row["value"] for row in said["trials"] if row["state"] == "finished")


def check_reports(folder: Path, said: dict[str, Any]) -> None:
    for row in said["trials"]:
        steps = [json.loads(line)["step"] for line in (folder / f"run-{row['number']:03d}/reports.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)), "a validation that is made again is not told again"
        assert (steps[-1] == 18) == (row["state"] == "finished")


def check_tracking(said: dict[str, Any]) -> None:
    door = client()
    assert door.get_run(said["run_id"]).info.status == "FINISHED"
    for row in said["trials"]:
        run = door.get_run(row["run_id"])
        assert run.data.tags["mlflow.parentRunId"] == said["run_id"]
        assert run.info.status == {"finished": "FINISHED", "stopped": "KILLED"}[row["state"]]
    points = door.get_metric_history(said["run_id"], "sweep/rsum")
    assert {point.step: point.value for point in points} == {row["number"]: row["value"] for row in said["trials"]}
