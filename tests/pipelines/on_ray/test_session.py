from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.on_ray.session import core, make_sockets_short
from tests.support import ROOT


@pytest.mark.e2e
def test_as_many_busy_tasks_run_at_once_as_there_are_cores_or_a_little_more(ray_local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On three cores and four CPUs a task takes one of them: two would leave a core idle."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_local, "cluster_resources", lambda: {"CPU": 4.0})  # on a larger machine it has more
    found: dict[int, int] = {}
    for cores in (1, 2, 3, 4, 64):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        found[cores] = core()
    assert found == {1: 4, 2: 2, 3: 1, 4: 1, 64: 1}
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert core() == 1, "a cluster's CPUs are what its nodes say"


@pytest.mark.e2e
def test_a_session_starts_whatever_the_length_of_the_temporary_folder(tmp_path: Path) -> None:
    long = tmp_path / ("a folder of a long name " * 5)
    long.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    environment |= {"TMPDIR": str(long), "PYTHONPATH": str(ROOT)}
    code = "from pipelines.on_ray.session import connect; connect(); import ray; print(ray.is_initialized()); ray.shutdown()"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert said.stdout.split()[-1:] == ["True"], said.stderr


def test_a_short_temporary_folder_stays_and_a_long_one_that_was_chosen_for_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    make_sockets_short()
    assert "RAY_TMPDIR" not in os.environ
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    with pytest.raises(ValueError, match=r"RAY_TMPDIR=/tmp/x+ is too long.*at most \d\d bytes"):
        make_sockets_short()
