"""A real cluster head with its dashboard, real jobs: train, evaluate, register; then the model is there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import itm
from itm.config import load_recipe
from itm.tracking.registry import find_version
from itm.tracking.runs import client
from pipelines.cli import RECIPES
from pipelines.submit import submit
from tests.support.ports import free_ports
from tests.support.registry_world import wait_for

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e


@pytest.fixture
def head(tmp_path: Path, registry: Path) -> Iterator[str]:
    """`ray start --head --block` under this process; only what it started is ended (`ray stop` would end every Ray of the machine)."""
    port, dashboard, agent, metrics, ray_client = free_ports(5)
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths below it must stay short
    bin_folder = Path(sys.executable).parent
    command = f"""{bin_folder}/ray start --head --block --disable-usage-stats --num-cpus 4 --object-store-memory {200 << 20}
        --port {port} --dashboard-port {dashboard} --dashboard-agent-listen-port {agent} --metrics-export-port {metrics}
        --ray-client-server-port {ray_client} --min-worker-port 0 --max-worker-port 0 --temp-dir {folder}"""
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    log = (tmp_path / "head.log").open("wb")
    process = subprocess.Popen(command.split(), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(f"{address}/api/version", process, tmp_path / "head.log")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_jobs_train_evaluate_and_register_a_model_on_a_cluster(head: str, registry: Path, tmp_path: Path, ray_local, capfd):
    from pipelines.pack import pack

    overrides = [
        f"data.root={tmp_path}/shards",
        f"output={tmp_path}/runs",
        "data.source.options.world=tiny",
        "train.steps=4",
        "train.batch_size=8",
        "train.warmup_steps=1",
        "train.validate_every=4",
        "registry.metric=rsum",
        "registry.model=job-model",
    ]
    pack(load_recipe(RECIPES / "demo.yaml", overrides))
    too_early = submit("register", ["-c", "demo", *overrides], head)
    assert too_early == 2
    assert "run `itm train` with the same recipe first" in capfd.readouterr().out
    for stage in ("train", "evaluate", "register"):
        assert submit(stage, ["-c", "demo", *overrides], head) == 0, capfd.readouterr().out
    version = find_version("models:/job-model@champion")
    assert (version.tags["recipe_name"], version.tags["git_commit"]) == ("demo", "c0ffee")
    run = client().get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert "test/auto/rsum" in run.data.metrics
    matcher = itm.load_matcher("models:/job-model@champion")
    assert matcher.encode_captions(matcher.inputs.captions(["a red circle"])).vector.shape == (1, 128)
    assert list(registry.rglob("model.safetensors"))
