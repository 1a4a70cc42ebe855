"""Tracking servers that are away at the beginning, in the middle and at the end of a run."""

from __future__ import annotations

import http.server
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from itm.data.patience import first_contact
from itm.tracking.addresses import DeadTracking, check_alive, is_alive
from itm.tracking.outages import fill, told_at_last
from itm.tracking.runs import Tracker, client
from pipelines.cli import stage_main
from tests.support.door import Door, door_to
from tests.support.ports import free_ports

pytest_plugins = ["tests.support.registry_fixtures"]


@pytest.fixture
def door() -> Iterator[Door]:
    """To a server that says that it is well."""

    class Well(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Well) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with door_to(f"http://127.0.0.1:{server.server_port}") as door:
            yield door
        server.shutdown()


def test_a_server_that_is_not_there_yet_is_refused_or_waited_for_as_long_as_a_stage_is_told(door: Door) -> None:
    door.shut()
    began = time.monotonic()
    with first_contact(), pytest.raises(DeadTracking, match=f"{door.port} .*--wait-for 120 waits"):
        check_alive(door.address)
    assert 2 <= time.monotonic() - began < 10
    threading.Timer(1.0, door.open).start()
    with first_contact(30):
        check_alive(door.address)
    assert is_alive(door.address)


def test_a_server_that_went_away_is_asked_for_as_long_as_a_store(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("itm.tracking.addresses._STILL_ALIVE", 0.0)
    check_alive(door.address)
    door.shut_for(1.0)
    check_alive(door.address)
    door.shut()
    monkeypatch.setenv("ITM_PATIENCE", "1")
    with pytest.raises(DeadTracking, match=r"it was asked for \d s. What was finished is kept: run the stage again"):
        check_alive(door.address)


def test_rows_that_a_run_has_not_got_are_logged_and_no_other_twice(registry: Path) -> None:
    rows = [{"step": step, "loss": 1.0 / step, "lr": 0.1 * step} for step in range(1, 6)]
    with Tracker.start("tests", "run") as tracker:
        for row in (rows[0], rows[3]):
            tracker.metrics({"train/loss": row["loss"], "train/lr": row["lr"]}, step=int(row["step"]))
        tracker.flush()
        assert fill(tracker, rows, "train/") == 3
        tracker.flush()
        assert fill(tracker, rows, "train/") == 0
        assert fill(tracker, [], "train/") == 0
    for name in ("loss", "lr"):
        points = client().get_metric_history(tracker.run_id, f"train/{name}")
        assert sorted((point.step, point.value) for point in points) == [(row["step"], row[name]) for row in rows]


def test_the_end_of_a_failed_run_does_not_wait_for_a_server_that_is_gone(
    registry: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [port] = free_ports(1)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="why it failed"), Tracker.start("tests", "run") as tracker:
        assert told_at_last(tracker), "the file of this test answers"
        tracker.uri = f"http://127.0.0.1:{port}"
        raise RuntimeError("why it failed")
    assert time.monotonic() - began < 10
    assert f"how run {tracker.run_id} ended is not recorded" in capsys.readouterr().err
    assert os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite"), "the run itself is in this test's file"
    assert client().get_run(tracker.run_id).info.status == "RUNNING"


def test_a_database_of_another_version_is_told_with_the_command_that_mends_it(
    registry: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect(registry / "mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        database.commit()
    assert stage_main("models", []) == 2
    said = capsys.readouterr().err
    assert "has the tables of another version of MLflow than" in said and "`mlflow db upgrade`" in said
    assert len(said.splitlines()) == 1
