"""The checks of tests/support/pretend, in a process of their own: the pretend CUDA device must be imported before torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

CHECKS = ["check_device.py", "check_steps.py", "check_second_pass.py", "check_use.py"]


@pytest.mark.e2e
@pytest.mark.parametrize("name", CHECKS)
def test_the_project_runs_on_a_cuda_device(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        with capsys.disabled():
            print(f"\nNO g++ HERE: {name} WAS NOT RUN, NOTHING OF IT IS CHECKED ON A CUDA DEVICE (install g++, or name a compiler in CXX)")
        pytest.skip("the pretend CUDA device is compiled with g++ (or CXX), which is not here")
    options = ["-c", os.devnull, "--rootdir", str(ROOT), "--noconftest", "-p", "no:cacheprovider", "-q", "-W", "ignore", "--durations=5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", *options, "--basetemp", str(tmp_path / "inner"), str(ROOT / "tests/support/pretend" / name)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    assert " passed" in done.stdout and " failed" not in done.stdout and " skipped" not in done.stdout
