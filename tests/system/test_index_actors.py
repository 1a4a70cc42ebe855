"""`itm index` through Ray: a build that was killed is finished by actors and has the bytes of one process."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.indexing.building import Wanted, build
from tests.support.disc_index import COLOURS, write_discs
from tests.support.registry_world import matcher_folder


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.e2e
def test_actors_write_the_bytes_that_one_process_writes_and_a_kill_keeps_what_is_whole(tmp_path, ray_local):
    shards = write_discs(tmp_path / "shards" / "test", COLOURS * 4, per_shard=2)
    folder = str(matcher_folder(tmp_path / "m", 2))
    asked = [sys.executable, "-m", "pipelines.index", "--model", folder, "--shards", shards, "--batch-size", "2", "--workers", "0"]
    killed = subprocess.Popen([*asked, "--output", str(tmp_path / "torn")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "torn").glob("test/*.captions.arrow")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    left = {f: os.stat(f).st_ino for f in (tmp_path / "torn" / "test").glob("0000?.arrow")}
    assert len(left) < 12, "killed before the end"
    assert not (tmp_path / "torn" / "index.json").exists()
    build(Wanted(folder, (shards,), str(tmp_path / "torn"), batch_size=2, workers=1))
    assert {f: os.stat(f).st_ino for f in left} == left, "what was done is not done again"
    build(Wanted(folder, (shards,), str(tmp_path / "whole"), batch_size=2))
    assert bytes_of(tmp_path / "torn") == bytes_of(tmp_path / "whole")
