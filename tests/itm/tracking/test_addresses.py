"""Paths with any printable character, first starts side by side, and servers that are dead."""

from __future__ import annotations

import json
import os
import socket
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import itm
from itm.tracking.addresses import DeadTracking, check_alive, folder_uri, local_path, sqlite_path, sqlite_uri, tracking_uri
from itm.tracking.fetch import download
from itm.tracking.registry import promote
from itm.tracking.runs import Tracker, check_recorded, client
from tests.support import ROOT
from tests.support.ports import free_ports
from tests.support.registry_world import matcher_folder, register_matcher

PRINTABLE = "".join(c for c in string.printable if c.isprintable() and c != "/") + "äöü ß"
FOLDERS = [PRINTABLE, "a?b", "a#b", "a%25b", "100%", "a{x}", "a:b", "a b", "ä", "a?x=1"]
pytest_plugins = ["tests.support.registry_fixtures"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_path_becomes_a_uri_and_comes_back(name: str, tmp_path: Path):
    folder = tmp_path / name
    assert sqlite_path(sqlite_uri(folder / "x.db")) == folder / "x.db"
    assert local_path(folder_uri(folder)) == folder


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("given", ["", "sqlite:///mlflow.db", "glued"])
def test_an_address_that_a_person_glued_together_means_the_folder_that_is_there(
    name: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / name}/mlflow.db" if given == "glued" else given)
    assert sqlite_path(tracking_uri()) == tmp_path / name / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri())
    monkeypatch.chdir(tmp_path)
    assert sqlite_path(tracking_uri()) == tmp_path / name / "mlflow.db"


def test_a_query_of_an_address_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/x.db?timeout=30")
    assert tracking_uri() == f"sqlite:///{tmp_path}/x.db?timeout=30"


@pytest.mark.e2e
@pytest.mark.parametrize("name", FOLDERS)
def test_field_case_22_runs_artifacts_and_models_lie_in_a_folder_of_any_name_and_nothing_beside_it(
    name: str, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = tmp_path / "beside" / name
    here.mkdir(parents=True)
    (here / "mlflow.db").write_bytes(empty_database.read_bytes())
    monkeypatch.chdir(here)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Tracker.start("an experiment", "run") as tracker:
        tracker.artifact(matcher_folder(here / "matcher"), "best")
    version = register_matcher(here / "matcher", "tiny", tracker.run_id, {"rsum": 1.0})
    promote("tiny", version, "rsum", 1.0)
    for uri in ("models:/tiny@champion", f"runs:/{tracker.run_id}/best/matcher", f"runs:/{tracker.run_id}/tiny", f"runs:/{tracker.run_id}"):
        assert download(uri).is_relative_to(here / "mlruns")
        itm.load_matcher(uri)
    assert [path.name for path in (tmp_path / "beside").iterdir()] == [name]
    assert {path.name for path in here.iterdir()} == {"mlflow.db", "mlruns", "matcher"}
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.e2e
def test_three_first_starts_at_once_on_a_fresh_database(tmp_path: Path):
    code = "from itm.tracking.runs import Tracker\nwith Tracker.start('first', 'run') as t: t.metrics({'x': 1.0})"
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        _, said = process.communicate(timeout=300)
        assert (process.returncode, said) == (0, "")
    door = client(sqlite_uri(tmp_path / "mlflow.db"))
    experiment = door.get_experiment_by_name("first")
    assert experiment is not None
    assert [run.info.status for run in door.search_runs([experiment.experiment_id])] == ["FINISHED"] * 3


def test_a_closed_port_is_a_dead_server_told_with_its_address_and_the_remedy(monkeypatch: pytest.MonkeyPatch):
    [port] = free_ports(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(DeadTracking, match=rf"127\.0\.0\.1:{port} .*refused.*set MLFLOW_TRACKING_URI") as told:
        Tracker.start("any", "run")
    assert time.monotonic() - began < 10
    assert "secret" not in str(told.value)
    with pytest.raises(DeadTracking, match="refused"):
        check_alive(f"postgresql://user@127.0.0.1:{port}/mlflow")


def test_a_port_that_accepts_and_never_answers_is_a_dead_server():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(DeadTracking, match=f"{port} \\(nothing within"):
            client(f"http://127.0.0.1:{port}")
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(("status", "alive"), [(b"401 Unauthorized", True), (b"404 Not Found", True), (b"502 Bad Gateway", False)])
def test_any_answer_but_that_of_a_gateway_shows_that_somebody_is_there(status: bytes, alive: bool):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        if alive:
            check_alive(uri)
        else:
            with pytest.raises(DeadTracking, match="502"):
                check_alive(uri)
        thread.join()


@pytest.mark.e2e
def test_a_run_of_another_store_is_told_with_both_stores(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Tracker.start("tests", "run") as tracker:
        pass
    check_recorded(tracker.run_id, "sqlite:////moved/since.db")  # the store asked has it, wherever it lay before
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    asked, recorded = f"sqlite:///{tmp_path}/mlflow.db", tracker.uri
    with pytest.raises(ValueError, match=f"{tracker.run_id} .*{asked}.*recorded in {recorded}: export MLFLOW_TRACKING_URI={recorded}"):
        check_recorded(tracker.run_id, recorded)
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.e2e
def test_a_run_keeps_its_log_its_error_and_the_versions_it_ran_with(registry: Path):
    with pytest.raises(RuntimeError), Tracker.start("tests", "run") as tracker:
        tracker.say("step 1")
        raise RuntimeError("boom at step 2")
    folder = next((registry / "mlruns").rglob(tracker.run_id)) / "artifacts"
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"]
    [log] = (folder / "log").iterdir()
    assert "step 1" in log.read_text() and "boom at step 2" in log.read_text() and log.read_text().endswith("FAILED\n")
