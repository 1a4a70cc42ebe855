"""A Ray cluster whose nodes are processes of this machine, each with an address of its own, that can be lost one by one."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.support.ports import free_ports

# A dead node refuses connections at once, a slow one only answers late: look often, be patient with an answer.
HEALTH = {"RAY_health_check_initial_delay_ms": "500", "RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "10000"}


class Cluster:
    """`ray start --block` under this process, an address of 127.0.0.0/8 for each node. Only what it started is ended."""

    def __init__(self, logs: Path) -> None:
        self.logs, [self.port, self.client_port] = logs, free_ports(2)
        self.folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths below it must stay short
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.joined = 0

    def start(self, cpus: int, hidden: str = "") -> subprocess.Popen[bytes]:
        """The head, or one more node; returns when it has joined. Ray gives it 30 s: on a busy machine it is tried again.

        hidden: a folder that is another, empty one for this node (needs root).
        """
        for _ in range(3):
            node, log = self._launch(cpus, hidden)
            while node.poll() is None:
                if "block forever" in log.read_text():
                    self.joined += 1
                    return node
                time.sleep(0.1)
            self.end(node)
        raise AssertionError(log.read_text()[-3000:])

    def _launch(self, cpus: int, hidden: str) -> tuple[subprocess.Popen[bytes], Path]:
        number = len(self.nodes) + 1
        where = f"--address 127.0.0.1:{self.port} --node-ip-address 127.0.0.{number}"
        if not self.joined:
            where = f"--head --port {self.port} --include-dashboard false --no-monitor --temp-dir {self.folder}"
            where += f" --ray-client-server-port {self.client_port}"
        command = f"""{Path(sys.executable).parent}/ray start --block --disable-usage-stats {where} --include-log-monitor false
            --num-cpus {cpus} --object-store-memory {100 << 20} --min-worker-port 0 --max-worker-port 0"""
        log = self.logs / f"node{number}.log"
        words = command.split()
        if hidden:
            words = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs tmpfs {hidden} && exec {shlex.join(words)}"]
        with log.open("wb") as out:
            node = subprocess.Popen(words, env=os.environ | HEALTH, stdout=out, stderr=out, start_new_session=True)
        self.nodes.append(node)
        return node, log

    def processes(self, node: subprocess.Popen[bytes], name: str = "") -> list[psutil.Process]:
        """Those of a node, which is a session of its own, whose command holds `name`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) == node.pid and name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def lose(self, node: subprocess.Popen[bytes]) -> None:
        """The raylet first: a node that loses power reports no death of a worker."""
        [raylet], workers = self.processes(node, "raylet/raylet"), self.processes(node, "RayTrainWorker")
        for process in (raylet, *workers):
            process.kill()

    def end(self, node: subprocess.Popen[bytes]) -> None:
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait(30)

    def stop(self) -> None:
        for node in self.nodes:
            self.end(node)
        shutil.rmtree(self.folder, ignore_errors=True)
