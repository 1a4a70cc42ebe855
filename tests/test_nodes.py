"""A node of a Ray cluster dies in mid-training and another takes over: not one bit is lost. Nodes are processes of this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.registry_world import free_ports
from tests.test_train import final, recipe, same, splits

pytest_plugins = ["tests.registry_fixtures"]
pytestmark = pytest.mark.e2e

# A dead node refuses connections at once, a slow one only answers late: look often, be patient with an answer.
HEALTH = {"RAY_health_check_initial_delay_ms": "500", "RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "10000"}
TRAIN = "import sys; from pipelines.cli import stage_main; sys.exit(any(stage_main('train', ['-c', path]) for path in sys.argv[1:]))"


def until(reached: Callable[[], Any], log: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, f"nothing in {seconds} s: {log.read_text()[-3000:]}"
        time.sleep(0.1)


class Cluster:
    """`ray start --block` under this process, an address of 127.0.0.0/8 for each node. Only what it started is ended."""

    def __init__(self, logs: Path) -> None:
        self.logs, [self.port] = logs, free_ports(1)
        self.folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths below it must stay short
        self.nodes: list[subprocess.Popen[bytes]] = []

    def start(self, cpus: int) -> subprocess.Popen[bytes]:
        """The head, or one more node; returns when it has joined."""
        number = len(self.nodes) + 1
        where = f"--address 127.0.0.1:{self.port}"
        if number == 1:
            where = f"--head --port {self.port} --include-dashboard false --no-monitor --temp-dir {self.folder}"
        command = f"""{Path(sys.executable).parent}/ray start --block --disable-usage-stats {where} --node-ip-address 127.0.0.{number}
            --num-cpus {cpus} --object-store-memory {100 << 20} --min-worker-port 0 --max-worker-port 0 --include-log-monitor false"""
        log = self.logs / f"node{number}.log"
        with log.open("wb") as out:
            node = subprocess.Popen(command.split(), env=os.environ | HEALTH, stdout=out, stderr=out, start_new_session=True)
        self.nodes.append(node)
        until(lambda: "block forever" in log.read_text(), log, node)
        return node

    def processes(self, node: subprocess.Popen[bytes], name: str = "") -> list[psutil.Process]:
        """Those of a node whose command holds `name`."""
        found = []
        for process in psutil.Process(node.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self) -> None:
        for node in self.nodes:
            if node.poll() is None:
                for process in (*self.processes(node), psutil.Process(node.pid)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            node.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def cluster(registry: Path, tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path)
    try:
        found.start(cpus=1)
        yield found
    finally:
        found.stop()


def test_another_node_takes_over_from_one_that_dies_bit_for_bit(cluster: Cluster, tmp_path: Path) -> None:
    """One worker on the head, one on the node that will die: a third node joins only when both have their places."""
    splits(tmp_path, shards=1, samples=24)
    given: dict[str, Any] = {"workers": 2, "batch_size": 3, "steps": 40, "validate_every": 40, "max_failures": 1}
    recipes, checkpoints = [], tmp_path / "runs" / "killed" / "checkpoints"
    for name in ("killed", "whole"):
        recipes.append(tmp_path / f"{name}.json")
        recipes[-1].write_text(recipe(tmp_path, name=name, **given).model_dump_json())
    victim, log = cluster.start(cpus=1), tmp_path / "train.log"
    with log.open("wb") as out:
        environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
        driver = subprocess.Popen([sys.executable, "-c", TRAIN, *map(str, recipes)], env=environment, stdout=out, stderr=out)
    try:
        until(lambda: cluster.processes(victim, "RayTrainWorker"), log, driver)
        cluster.start(cpus=2)
        [raylet], workers = cluster.processes(victim, "raylet/raylet"), cluster.processes(victim, "RayTrainWorker")
        until(lambda: (checkpoints / "000000004.json").exists(), log, driver)
        for process in (raylet, *workers):  # the raylet first: a node that loses power reports no death of a worker
            process.kill()
        assert not (checkpoints / "000000040.json").exists(), "it died too late"
        until(lambda: (tmp_path / "runs" / "killed" / "run.json").exists(), log, driver)
        assert driver.wait(120) == 0, log.read_text()[-3000:]
    finally:
        driver.kill()
        driver.wait()
    assert same(final(tmp_path, "killed", 40), final(tmp_path, "whole", 40))
