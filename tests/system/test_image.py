"""The RUN lines of cluster/Dockerfile, as far as they go without a container runtime: apt and pip say what they would do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


def run_lines() -> list[str]:
    text = re.sub(r"\\\n", " ", (ROOT / "cluster" / "Dockerfile").read_text())
    return [line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN ")]


def copied() -> list[str]:
    """What the image gets of this repository, all of it from the root."""
    lines = [line.split()[1:-1] for line in (ROOT / "cluster" / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    return [word for words in lines for word in words if not word.startswith("--")]


def test_the_system_packages_of_the_image_are_known_to_apt() -> None:
    if not shutil.which("apt-get"):
        pytest.skip("no apt-get on this machine")
    (line,) = [line for line in run_lines() if "apt-get" in line]
    (install,) = re.findall(r"apt-get (install [^&]+)", line)
    done = subprocess.run(["apt-get", "--simulate", *install.split()], capture_output=True, text=True, check=False)
    if "Unable to locate package" in done.stderr and not list(Path("/var/lib/apt/lists").glob("*_Packages*")):
        pytest.skip("apt has no lists here: apt-get update")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("index", ["", "an-index"])
def test_the_pip_line_of_the_image_is_one_that_pip_takes_with_extras_that_are_there(index: str, tmp_path: Path) -> None:
    """The line itself, in a shell, with a pip that installs nothing and leaves out what the packages need: tests/system/test_wheel.py
    installs the extras in full, and CUDA's wheels alone are gigabytes."""
    (line,) = [line for line in run_lines() if "pip install" in line]
    (tmp_path / "bin").mkdir()
    there = tmp_path / "itm"
    there.mkdir()
    for name in copied():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, there / name)
    pip = tmp_path / "bin" / "pip"
    # What comes from an index of torch alone is noted: it is not reached from everywhere.
    pip.write_text(
        f'#!/bin/sh\ncase "$*" in *--index-url*) echo "$*" >> {tmp_path}/torch; exit 0;; esac\n'
        f'exec {sys.executable} -m pip --isolated "$@" --dry-run --no-deps --ignore-installed --report {tmp_path}/report.json\n'
    )
    pip.chmod(0o755)
    variables = os.environ | {"PATH": f"{pip.parent}:{os.environ['PATH']}", "TORCH_INDEX": index, "EXTRAS": "all,gpu"}
    done = subprocess.run(["sh", "-c", line], cwd=there, env=variables, capture_output=True, text=True, check=False)
    if re.search(r"No matching distribution|NewConnectionError|Max retries", done.stderr):
        pytest.skip(f"NOT TESTED: pip reaches no registry from here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr
    torch = tmp_path / "torch"
    assert (torch.read_text().split() if index else torch.exists()) == (
        ["install", "--no-cache-dir", "-c", "constraints.txt", "torch", "--index-url", "an-index"] if index else False
    )
    found = {item["metadata"]["name"] for item in json.loads((tmp_path / "report.json").read_text())["install"]}
    assert found == {"itm-pipeline", "psycopg2-binary"}
