"""The lab: a head that computes nothing, workers, and a submitter that has the wheel and a recipe of its own, before shared services.

No folder is shared. The nodes have Python and what is installed in it, keys of the store, and no copy of this project's code; the submitter
has no key.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pyarrow import fs

from pipelines.on_ray.feeding import LABEL
from tests.support import ROOT
from tests.support.lab.machines import SERVICES, SUBNET, Machine
from tests.support.lab.proxy import Proxy
from tests.support.lab.services import KEYS, services
from tests.support.node_cluster import HEALTH
from tests.support.s3_server import BUCKET

STORE, TRACKING, DASHBOARD = f"http://{SERVICES}:9000", f"http://{SERVICES}:5000", f"http://{SUBNET}.10:8265"
RAY = {
    **HEALTH,
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # else a group that lost a node waits a minute for another before it shrinks
    "RAY_prestart_worker_first_driver": "0",  # else each job starts eight idle processes, a CPU-second each
    "RAY_memory_monitor_refresh_ms": "0",  # the machines share one memory: each would end its job for what the others hold
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def lab_recipe(**given: Any) -> dict[str, Any]:
    """60 scenes, 20 steps of CUSA by two workers; `given` are further values by dotted key with `__` for the dot."""
    options = {"world": "tiny"}
    image, text = {"kind": "conv", "image_size": 16, "hidden": 16}, {"kind": "pooled_gru", "word_dim": 8, "hidden": 8}
    recipe: dict[str, Any] = {
        "name": "lab",
        "output": f"s3://{BUCKET}/runs",
        "data": {
            "root": f"s3://{BUCKET}/shards",
            "source": {"kind": "scenes", "options": {**options, "n_train": 40, "n_val": 8, "n_test": 12}},
            "shard_samples": 8,
            "image_size": 16,
            "crop": "random",
        },
        "text": {"max_length": 10},
        "teachers": {"image": {"kind": "scenes_image", "options": options}, "text": {"kind": "scenes_text", "options": options}},
        "model": {"kind": "dual", "options": {"image": image, "text": text, "width": 8}},
        "method": {"kind": "cusa"},
        "train": {
            "batch_size": 10,
            "steps": 20,
            "workers": 2,
            "validate_every": 10,
            "checkpoint_every": 5,
            "log_every": 1,
            "max_failures": 3,
        },
        "registry": {"metric": "rsum", "model": "lab"},
    }
    for key, value in given.items():
        inner = recipe
        *path, last = key.split("__")
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return recipe


@dataclass
class Lab:
    """The running lab. store_port, tracking_port: of the services on this machine, past every proxy."""

    folder: Path
    switch: Machine
    store: Proxy
    tracking: Proxy
    stack: ExitStack
    head: Machine = field(init=False)
    submitter: Machine = field(init=False)
    workers: list[Machine] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, cpus: int, labels: str = "", **machine: Any) -> Machine:
        """A machine with a node of Ray on it, the head first; returns when it has joined."""
        address = f"{SUBNET}.{10 + (len(self.workers) + 1 if name != 'head' else 0)}"
        node = self._node(name, address, **machine)
        if name == "head":
            self.head = node
        else:
            self.workers.append(node)
        self.join(node, cpus, labels)
        return node

    def replace(self, worker: int, cpus: int = 2) -> None:
        """An empty machine in the place of a lost one, at the next address: the old one may still be known as dead."""
        old = self.workers[worker]
        number = int(old.address.rpartition(".")[2]) + 20
        self.workers[worker] = self._node(f"{old.name}x", f"{SUBNET}.{number if number < 90 else number - 60}")
        self.join(self.workers[worker], cpus)

    def _node(self, name: str, address: str, **machine: Any) -> Machine:
        node = Machine(name, address, self.switch, environment={**RAY, **KEYS, "AWS_ENDPOINT_URL": STORE}, **machine)
        self.stack.callback(node.lose)
        return node

    def join(self, node: Machine, cpus: int, labels: str = "") -> None:
        """Start Ray on a machine. A busy machine does not make it in Ray's 30 s: it is tried again."""
        where = f"--address {self.head.address}:6379"
        if node is self.head:
            where = "--head --port 6379 --dashboard-host 0.0.0.0 --dashboard-port 8265 --no-monitor --ray-client-server-port 20001"
        command = f"""ray start --block --disable-usage-stats {where} --node-ip-address {node.address} --num-cpus {cpus}
            --include-log-monitor false --object-store-memory {150 << 20} --temp-dir /tmp/ray {f"--labels {labels}" if labels else ""}"""
        log = self.folder / f"{node.name}.log"
        for _ in range(3):
            process, end = node.start(command, log), time.monotonic() + 120
            while process.poll() is None and time.monotonic() < end:
                if "block forever" in log.read_text():
                    return
                time.sleep(0.1)
        raise AssertionError(log.read_text()[-3000:])

    def submit(self, stage: str, *arguments: str, recipe: str = "mine.yaml", check: bool = True) -> str:
        """`itm submit` of a stage that reads the recipe; its output. Its seconds are kept under the stage's name."""
        return self._timed(stage, ["itm", "submit", stage, "-c", recipe, *arguments], check)

    def start(self, stage: str, *arguments: str, recipe: str = "mine.yaml", log: Path | None = None) -> subprocess.Popen[bytes]:
        """As `submit`, without waiting for it."""
        return self.submitter.start(["itm", "submit", stage, "-c", recipe, *arguments], log)

    def search(self, *arguments: str) -> str:
        return self._timed("search", ["itm", "submit", "search", *arguments], check=True)

    def _timed(self, stage: str, command: Sequence[str], check: bool) -> str:
        begin = time.monotonic()
        said = self.submitter.run(command, check=check)
        self.seconds[stage] = time.monotonic() - begin
        (self.folder / f"{stage}.log").write_text(said)
        print(f"{stage}: {self.seconds[stage]:.0f} s", flush=True)
        return said

    def write_recipe(self, recipe: dict[str, Any], name: str = "mine.yaml") -> None:
        """Into the submitter's working folder."""
        self.submitter.write(name, yaml.safe_dump(recipe, sort_keys=False))

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Keys below a prefix of the bucket and their bytes, past the proxy."""
        store, found = self.filesystem(), {}
        for info in store.get_file_info(fs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True)):
            if info.is_file:
                with store.open_input_stream(info.path) as stream:
                    found[info.path.removeprefix(f"{BUCKET}/")] = stream.read()
        return found

    def filesystem(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            access_key="key", secret_key="secret", region="us-east-1", endpoint_override=f"127.0.0.1:{self.store.upstream}", scheme="http"
        )


@contextmanager
def lab(folder: Path, workers: int = 4, cpus: int = 2, feeders: int = 0) -> Iterator[Lab]:
    """The lab with `workers` nodes of `cpus` each, the last `feeders` of which get no trainers. All of it is gone at the end."""
    begin = time.monotonic()
    with ExitStack() as stack:
        packages = installed_wheel(folder)
        store, tracking = stack.enter_context(services(folder, TRACKING.removeprefix("http://")))
        switch = Machine("switch", SERVICES)
        stack.callback(switch.lose)
        found = Lab(folder, switch, Proxy(switch, 9000, store), Proxy(switch, 5000, tracking), stack)
        for proxy in (found.store, found.tracking):
            stack.callback(proxy.close)
        found.add("head", 0)
        for number in range(1, workers + 1):
            found.add(f"w{number}", cpus, labels=f"{LABEL}=true" if number > workers - feeders else "")
        told = {"PYTHONPATH": str(packages), "RAY_ADDRESS": DASHBOARD, "RAY_AUTH_MODE": "disabled", "MLFLOW_TRACKING_URI": TRACKING}
        found.submitter = Machine("submitter", f"{SUBNET}.90", switch, seen=[packages], environment=told)
        stack.callback(found.submitter.lose)
        found.seconds["start of the cluster"] = time.monotonic() - begin
        print(f"start of the cluster: {found.seconds['start of the cluster']:.0f} s", flush=True)
        yield found


def installed_wheel(folder: Path) -> Path:
    """A folder that holds what the wheel installs, built from a copy of the sources."""
    source, packages = folder / "source", folder / "packages"
    for name in ("itm", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("itm_pipeline-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(packages), str(wheel)], check=True)
    return packages
