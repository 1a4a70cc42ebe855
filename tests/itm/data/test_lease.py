"""One driver at a time is at work on an output: the second is told of the first, and a dead one is in nobody's way."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from itm.data import files, lease
from itm.data.lease import NAME, Held, held, holder, was_left
from tests.support import ROOT
from tests.support.s3_server import BUCKET, s3_server

OTHER = """
import sys, time
from itm.data.lease import held
with held(sys.argv[1], "pack"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server():
        yield f"s3://{BUCKET}"


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> str:
    return str(tmp_path) if request.param == "local" else f"{bucket}/{tmp_path.name}"


def foreign(folder: str, **given: Any) -> None:
    """The lease of a driver of another machine, renewed now."""
    said = json.loads(lease.Lease.of_this_process("train").said()) | {"host": "elsewhere pid:[1]", "user": "ada", "pid": 7} | given
    files.write_atomic(files.join(folder, NAME), json.dumps(said).encode())


def test_a_second_driver_is_refused_with_the_name_of_the_first_which_goes_on(folder: str) -> None:
    assert holder(folder) is None
    with held(folder, "train"):
        who = rf"itm train of \w+ on {re.escape(socket.gethostname())} \(process {os.getpid()}\) since \d{{4}}-.*, last seen \d s ago"
        with pytest.raises(Held, match=rf"{re.escape(folder)} is in use by {who}: wait for its end"), held(folder, "pack"):
            pass
        assert re.fullmatch(who, holder(folder) or "")
    assert holder(folder) is None and not was_left(folder)
    assert files.sizes(folder) == {}
    with held(folder, "pack"):
        pass


def test_of_drivers_that_start_at_once_one_gets_it(folder: str) -> None:
    foreign(folder, host=lease._machine(), pid=2**22 + 1)  # a dead one's lies there
    assert was_left(folder)
    got, refused, start, over = [], [], threading.Barrier(4), threading.Event()

    def drive() -> None:
        start.wait()
        try:
            with held(folder, "train"):
                got.append(1)
                over.wait(40)
        except Held:
            refused.append(1)
            if len(refused) == 3:
                over.set()

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(got), len(refused)) == (1, 3)


def test_a_driver_that_was_killed_is_in_nobodys_way(tmp_path: Path) -> None:
    words = [sys.executable, "-c", OTHER, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with pytest.raises(Held, match=rf"itm pack of \w+ on .* \(process {other.pid}\)"), held(str(tmp_path), "pack"):
            pass
        other.send_signal(signal.SIGKILL)
        for _ in range(100):
            if holder(str(tmp_path)) is None:  # it need not have been waited for: a zombie is dead
                break
            time.sleep(0.05)
        assert was_left(str(tmp_path))
        with held(str(tmp_path), "pack"):
            pass


def test_a_driver_of_another_machine_is_dead_when_it_has_been_silent_by_the_clock_of_the_store(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(folder)
    with pytest.raises(Held, match=r"itm train of ada on elsewhere \(process 7\)"), held(folder, "train"):
        pass
    monkeypatch.setattr(lease, "STALE", 0.5)
    time.sleep(1.6)  # S3 tells whole seconds
    with held(folder, "train"):
        pass


def test_the_heartbeat_keeps_a_lease_alive(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.2)
    with held(folder, "train"):
        before = files.modified(files.join(folder, NAME))
        time.sleep(2.2)
        assert files.modified(files.join(folder, NAME)) > before


def test_a_store_that_knows_no_conditions_still_refuses_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "memory://leases"
    with held(folder, "train"), pytest.raises(Held, match="in use by itm train"), held(folder, "train"):
        pass
    assert files.sizes(folder) == {}


def test_what_is_no_lease_is_taken(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("{")
    with held(str(tmp_path), "train"):
        pass
    assert not list(tmp_path.iterdir())
