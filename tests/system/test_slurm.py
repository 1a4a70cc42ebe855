"""cluster/slurm/itm.sbatch on a real Slurm of two nodes: a training over both, its exit code, and the warning before the time limit."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.slurm import two_nodes, why_not
from tests.support.small_training import recipe, splits

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(why_not()), reason=f"NOT TESTED on Slurm: {why_not()}")]


@pytest.fixture
def slurm(registry: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a user of the two nodes, with the small splits below tmp_path. Jobs leave nothing in the folder for Ray."""
    splits(tmp_path)
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder, two_nodes() as environment:
        yield environment | {"ITM_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "ITM_RAY_FOLDER": folder}
        assert not list(Path(folder).iterdir())


def sbatch(environment: dict[str, str], folder: Path, *words: str, nodes: int, wait: bool = True) -> subprocess.Popen[str]:
    options = [f"--nodes={nodes}", "--cpus-per-task=2", f"--output={folder}/job.log", "--parsable", *["--wait"] * wait]
    command = ["sbatch", *options, str(ROOT / "cluster/slurm/itm.sbatch"), *words]
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True)


def test_two_workers_train_on_two_nodes_and_the_job_ends_with_the_code_of_its_stage(slurm: dict[str, str], tmp_path: Path) -> None:
    small = recipe(tmp_path, steps=6, workers=2, validate_every=3)
    (tmp_path / "r.json").write_text(small.model_dump_json(exclude_unset=True))
    assert sbatch(slurm, tmp_path, "train", "-c", f"{tmp_path}/r.json", nodes=2).wait(300) == 0, (tmp_path / "job.log").read_text()
    log = (tmp_path / "job.log").read_text()
    assert log.count("Ray runtime started.") == 2, "a head, and a worker on the other node"
    done = json.loads((tmp_path / "runs/run/run.json").read_text())
    assert (done["steps"], done["rows_in"]) == (6, 6 * 6 * 2)


def test_the_warning_before_the_time_limit_stops_the_stage_with_what_it_has_and_the_same_line_goes_on(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    small = recipe(tmp_path, steps=100_000, workers=1, validate_every=50_000, checkpoint_every=5, log_every=50)
    (tmp_path / "r.json").write_text(small.model_dump_json(exclude_unset=True))
    job = sbatch(slurm, tmp_path, "train", "-c", f"{tmp_path}/r.json", nodes=1)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "runs/run/checkpoints").glob("*.json")):
        assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "job.log").read_text()
        time.sleep(0.5)
    number = subprocess.run(["squeue", "-h", "-o", "%i"], env=slurm, capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["scancel", "--batch", "--signal=TERM", number], env=slurm, check=True)  # what --signal=B:TERM@180 has Slurm send
    assert job.wait(120) == 130, (tmp_path / "job.log").read_text()
    assert "itm train: stopped; the checkpoint of step" in (tmp_path / "job.log").read_text()
