"""One service on Ray Serve over two models of a registry, as `itm serve` starts it, for all tests of this folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from itm.matchers.folder import save_matcher
from itm.tracking.registry import promote
from itm.tracking.runs import Tracker
from pipelines.serving.client import Client
from tests.support import ROOT
from tests.support.ports import free_ports
from tests.support.registry_world import register_matcher, wait_for
from tests.support.serving_world import DUAL, SCAN, matcher_for, saved, scenes, write_scenes

SCENES = 60


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """address, client, name of the registered model (champion is version 1, version 2 has other weights), folder, process, log."""
    folder = tmp_path_factory.mktemp("service")
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    rows = scenes(SCENES)
    shards = write_scenes(folder / "shards" / "test", rows, framed=True)
    with Tracker.start("tests", "run") as tracker:
        for seed, rsum in ((1, 1.0), (2, 0.5)):
            save_matcher(matcher_for(rows, DUAL, seed=seed), folder / f"dual{seed}")
            promote("dual", register_matcher(folder / f"dual{seed}", "dual", tracker.run_id, {}), "rsum", rsum)
    scan = saved(matcher_for(rows, SCAN), folder / "scan")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "pipelines.cli", "serve", "--model", "dual=models:/dual@champion", "--model", f"scan={scan}"]
    command += ["--shards", shards, "--port", str(port), "--replicas", "2", "--rate", "0"]
    log = folder / "log"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for(f"{address}/readyz", process, log)
            yield SimpleNamespace(address=address, client=Client(address), folder=folder, process=process, log=log, rows=rows)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            if before is None:
                del os.environ["MLFLOW_TRACKING_URI"]
            else:
                os.environ["MLFLOW_TRACKING_URI"] = before
