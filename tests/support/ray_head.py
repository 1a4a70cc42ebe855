"""A real Ray head in processes of its own, with dashboard and exporter; only what it started is ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_ports
from tests.support.registry_world import wait_for


@dataclass(frozen=True)
class Head:
    """dashboard: the address for jobs; address: for drivers; metrics: the port of the exporter of its node, which answers
    some seconds later; process: of `ray start`."""

    dashboard: str
    address: str
    metrics: int
    process: subprocess.Popen[bytes]


@contextmanager
def ray_head(log: Path, **environment: str) -> Iterator[Head]:
    """`ray start --head --block` with 4 logical CPUs (`ray stop` would end every Ray of the machine)."""
    port, dashboard, agent, metrics, ray_client = free_ports(5)
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths below it must stay short
    bin_folder = Path(sys.executable).parent
    command = f"""{bin_folder}/ray start --head --block --disable-usage-stats --num-cpus 4 --object-store-memory {200 << 20}
        --port {port} --dashboard-port {dashboard} --dashboard-agent-listen-port {agent} --metrics-export-port {metrics}
        --ray-client-server-port {ray_client} --min-worker-port 0 --max-worker-port 0 --temp-dir {folder}"""
    variables = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"} | environment
    with log.open("wb") as out:
        process = subprocess.Popen(command.split(), env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        address = f"http://127.0.0.1:{dashboard}"
        try:
            wait_for(f"{address}/api/version", process, log)
            yield Head(address, f"127.0.0.1:{port}", metrics, process)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            shutil.rmtree(folder, ignore_errors=True)
