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
def test_pip_finds_what_the_image_asks_for_at_the_versions_of_the_constraints(index: str, tmp_path: Path) -> None:
    """The line itself, in a shell, in a fresh environment, with a pip that does not install: its own resolver with --dry-run."""
    (line,) = [line for line in run_lines() if "pip install" in line]
    tools = tmp_path / "bin"
    tools.mkdir()
    real = f"{sys.executable} -m pip --isolated --python {tmp_path}/env/bin/python"
    report = tmp_path / "report"
    # What comes from an index of torch alone is left out: it is not reached from everywhere.
    (tools / "pip").write_text(
        f'#!/bin/sh\ncase "$*" in *--index-url*) echo "$*" >> {tmp_path}/torch; exit 0;; esac\n'
        f'exec {real} "$@" --dry-run --quiet --report {report}.json\n'
    )
    (tools / "pip").chmod(0o755)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", f"{tmp_path}/env"], check=True)
    variables = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "TORCH_INDEX": index, "EXTRAS": "all,gpu"}
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if re.search(r"No matching distribution|Could not find a version|NewConnectionError|Max retries", done.stderr):
        pytest.skip(f"NOT TESTED: pip reaches no registry from here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "torch").exists() == bool(index)
    found = {
        item["metadata"]["name"].lower(): item["metadata"]["version"] for item in json.loads(Path(f"{report}.json").read_text())["install"]
    }
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name in ("torch", "ray", "mlflow", "boto3", "nvidia-ml-py", "psycopg2-binary"):
        assert name in found, sorted(found)
        assert found[name] == pinned.get(name, found[name])
    assert any(name.startswith("nvidia-") and name != "nvidia-ml-py" for name in found), "the default index has torch with CUDA"
