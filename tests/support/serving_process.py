"""`itm serve` in a process of its own over two models of a registry, clients that ask all the time, and the processes of the replicas."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil

from itm.matchers.folder import save_matcher
from itm.tracking.registry import promote
from itm.tracking.runs import Tracker
from pipelines.index import index
from pipelines.indexing.building import Wanted
from pipelines.serving.client import Client
from tests.support import ROOT
from tests.support.ports import free_ports
from tests.support.registry_world import register_matcher, wait_for
from tests.support.serving_world import DUAL, SCAN, matcher_for, saved, scenes, write_scenes

SCENES = 60
QUESTION = "a red circle to the left of a blue square"


@contextmanager
def two_models(folder: Path) -> Iterator[SimpleNamespace]:
    """A registered dual encoder (champion is version 1, version 2 has other weights) and a SCAN, served by two replicas each.

    address, client, folder, process, log, rows and shards (the scenes that are searched), scanned (what made the index of SCAN).
    """
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    try:
        rows = scenes(SCENES)
        shards = write_scenes(folder / "shards" / "test", rows, framed=True)
        with Tracker.start("tests", "run") as tracker:
            for seed, rsum in ((1, 1.0), (2, 0.5)):
                save_matcher(matcher_for(rows, DUAL, seed=seed), folder / f"dual{seed}")
                promote("dual", register_matcher(folder / f"dual{seed}", "dual", tracker.run_id, {}), "rsum", rsum)
        scan = saved(matcher_for(rows, SCAN), folder / "scan")
        for number in ("1", "2"):
            index(Wanted(str(folder / f"dual{number}"), (shards,), str(folder / "index" / number), dtype="fp32", device="cpu"))
        scanned = Wanted(scan, (shards,), str(folder / "index" / "scan"), dtype="fp32", device="cpu")
        index(scanned)
        models = ["--model", "dual=models:/dual@champion", "--model", f"scan={scan}", "--replicas", "2"]
        indexes = ["--index", str(folder / "index" / "{version}"), "--index", scanned.output]
        with serving(folder, [*models, *indexes]) as service:
            service.rows, service.shards, service.scanned = rows, shards, scanned
            yield service
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


@contextmanager
def serving(folder: Path, arguments: Sequence[str]) -> Iterator[SimpleNamespace]:
    """address, client, folder, process, log."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "pipelines.cli", "serve", *arguments, "--port", str(port), "--rate", "0"]
    log, address = folder / "log", f"http://127.0.0.1:{port}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_for(f"{address}/readyz", process, log)
            yield SimpleNamespace(address=address, client=Client(address), folder=folder, process=process, log=log)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


class Asking:
    """Clients that ask all the time; what fails is kept."""

    def __init__(self, address: str, clients: int = 4, model: str = "dual") -> None:
        self.model = model
        self.faults: list[str] = []
        self.versions: list[str] = []
        self.seconds: list[float] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(Client(address, tries=1),)) for _ in range(clients)]

    def _ask(self, client: Client) -> None:
        while not self.over.is_set():
            try:
                begun = time.perf_counter()
                self.versions.append(client.search(QUESTION, k=3, model=self.model)["version"])
                self.seconds.append(time.perf_counter() - begun)
            except Exception as error:
                self.faults.append(f"{type(error).__name__}: {error}")

    def __enter__(self) -> Asking:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


def until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.2)


def replicas(process: int, name: str) -> list[psutil.Process]:
    """Processes below `process` that hold a replica of the model."""
    found = []
    for child in psutil.Process(process).children(recursive=True):
        try:
            if f"ServeReplica:itm:model-{name}" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found
