"""A training whose store and tracking server are both away for a while, in the middle of it: it goes on, and nothing is lost.

A store that stays away ends it with one sentence; the same command goes on from the checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from itm.config import Recipe, parse_recipe
from itm.data import files, patience
from itm.matchers.folder import load_matcher_folder
from itm.tracking.runs import client
from itm.training.step import Step
from pipelines.cli import stage_main
from tests.support.door import Door, door_to
from tests.support.ports import free_ports
from tests.support.registry_world import wait_for
from tests.support.s3_server import BUCKET, s3_server
from tests.support.small_training import recipe, same, splits

AWAY = 20.0
STEPS = 10


@dataclass
class Services:
    store: Door
    tracking: Door


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("server")
    [port] = free_ports(1)
    words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    words += ["--artifacts-destination", str(folder / "kept"), "--port", str(port), "--allowed-hosts", "*"]
    given = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with s3_server() as store, (folder / "log").open("wb") as log, pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen(words, env=given, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
            with door_to(store) as one, door_to(f"http://127.0.0.1:{port}") as other:
                patch.setenv("AWS_ENDPOINT_URL", one.address)
                patch.setenv("MLFLOW_TRACKING_URI", other.address)
                yield Services(one, other)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def in_store(root: Path, name: str) -> Recipe:
    """A recipe whose shards and outputs are in the store."""
    splits(root)
    for split in ("train", "val"):
        for path in (root / "shards" / split).iterdir():
            files.write_atomic(f"s3://{BUCKET}/{name}/shards/{split}/{path.name}", path.read_bytes())
    said = recipe(root, steps=STEPS).model_dump(mode="json")
    said["data"]["root"], said["output"] = f"s3://{BUCKET}/{name}/shards", f"s3://{BUCKET}/{name}/runs"
    return parse_recipe(said)


def train(choices: Recipe, folder: Path) -> int:
    (folder / "r.json").write_text(choices.model_dump_json())
    return stage_main("train", ["-c", str(folder / "r.json")])


def at_step(number: int, monkeypatch: pytest.MonkeyPatch, happens: object) -> None:
    """`happens()` just before a training takes a step for the first time."""
    whole, waiting = Step.__call__, [happens]

    def taking(self: Step, batches: object, step: int) -> object:
        if step == number and waiting:
            waiting.pop()()  # type: ignore[operator]
        return whole(self, batches, step)  # type: ignore[arg-type]

    monkeypatch.setattr(Step, "__call__", taking)


def logged(run_id: str) -> list[int]:
    return sorted(point.step for point in client().get_metric_history(run_id, "train/loss"))


def test_a_training_goes_on_while_the_store_and_the_tracking_server_are_away(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choices, quiet = in_store(tmp_path, "loud"), in_store(tmp_path, "quiet")
    assert train(quiet, tmp_path) == 0

    def away() -> None:
        services.store.shut_for(AWAY)
        services.tracking.shut_for(AWAY)

    before = patience.ASKED.waited
    with monkeypatch.context() as patch:
        at_step(5, patch, away)
        assert train(choices, tmp_path) == 0
    assert patience.ASKED.waited - before > AWAY / 2
    assert "the store was asked again" in capsys.readouterr().err
    done = json.loads(files.read_bytes(f"{choices.folder}/run.json"))
    assert logged(done["run_id"]) == list(range(1, STEPS + 1))
    assert "asked again" in client().get_run(done["run_id"]).data.tags["store"]
    there, here = (dict(load_matcher_folder(f"{one.folder}/matcher").state_dict()) for one in (choices, quiet))
    assert same(there, here)


def test_a_store_that_stays_away_ends_a_training_in_one_sentence_and_the_same_command_goes_on(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = in_store(tmp_path, "gone")
    monkeypatch.setenv("ITM_PATIENCE", "2")
    with monkeypatch.context() as patch:
        at_step(7, patch, services.store.shut)
        assert train(choices, tmp_path) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("itm train: ")]
    assert len(said) == 1 and "the store did not answer" in said[0] and "run the stage again when the store is back, it resumes" in said[0]
    began = time.monotonic()
    assert train(choices, tmp_path) == 2, "at the beginning it is refused at once"
    assert time.monotonic() - began < 15
    threading.Timer(3.0, services.store.open).start()
    (tmp_path / "r.json").write_text(choices.model_dump_json())
    assert stage_main("train", ["-c", str(tmp_path / "r.json"), "--wait-for", "60"]) == 0
    done = json.loads(files.read_bytes(f"{choices.folder}/run.json"))
    assert done["steps"] == STEPS and logged(done["run_id"])[-1] == STEPS
    assert set(logged(done["run_id"])) == set(range(1, STEPS + 1))
