"""The service on real Ray Serve: answers, a moved alias and a killed replica, both without a failed request."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import itm
from itm.retrieval.engine import search
from itm.tracking.registry import crown
from pipelines.serving.client import Client, ServiceRefused

QUESTION = "a red circle to the left of a blue square"
SWAPPED = 60.0  # seconds; 30 are promised, on a machine that has nothing else to do


class Asking:
    """Clients that ask all the time; what fails is kept."""

    def __init__(self, address: str, clients: int = 4) -> None:
        self.faults: list[str] = []
        self.versions: list[str] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(Client(address, tries=1),)) for _ in range(clients)]

    def _ask(self, client: Client) -> None:
        while not self.over.is_set():
            try:
                self.versions.append(client.search(QUESTION, k=3)["version"])
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


def test_the_answers_are_those_of_a_search_in_this_process(service: SimpleNamespace):
    for name, folder in (("dual", "dual1"), ("scan", "scan")):
        told = service.client.search(QUESTION, k=5, model=name)
        wanted = search(QUESTION, model=itm.load_matcher(service.folder / folder), shards=str(service.folder / "shards" / "test"), k=5)
        assert [answer["key"] for answer in told["answers"]] == [hit.key for hit in wanted.hits]
        assert [answer["score"] for answer in told["answers"]] == pytest.approx([hit.score for hit in wanted.hits], abs=1e-5)
    first = service.client.photo(told["answers"][0]["key"])
    assert first[:3] == b"\xff\xd8\xff"
    assert {a["key"] for a in service.client.pages(QUESTION, k=20)} == {row.key for row in service.rows}
    with pytest.raises(ServiceRefused, match="no column 'nothing'"):
        service.client.search(QUESTION, where={"nothing": ["x"]})


def test_a_killed_replica_costs_no_request(service: SimpleNamespace):
    until(lambda: len(replicas(service.process.pid, "dual")) == 2, 30)
    victim = replicas(service.process.pid, "dual")[0]
    with Asking(service.address) as asking:
        until(lambda: len(asking.versions) > 8, 30)
        os.kill(victim.pid, signal.SIGKILL)
        seen = len(asking.versions)
        until(lambda: len(asking.versions) > seen + 20, 60)
    assert asking.faults == []
    until(lambda: len(replicas(service.process.pid, "dual")) == 2, 90)


def test_a_moved_alias_is_served_without_a_failed_request(service: SimpleNamespace):
    version = service.client.search(QUESTION)["version"]
    other = "1" if version.endswith("/2") else "2"
    with Asking(service.address) as asking:
        until(lambda: len(asking.versions) > 4, 30)
        crown("dual", other)
        until(lambda: asking.versions[-20:] == [f"dual/{other}"] * 20, SWAPPED)
    assert asking.faults == []
    assert set(asking.versions) == {version, f"dual/{other}"}
    (told,) = [model for model in service.client.models() if model["name"] == "dual"]
    assert (told["version"], told["problem"]) == (f"dual/{other}", None)


def test_no_question_is_in_a_log(service: SimpleNamespace):
    secret = "a word that nobody else says: xylophonist"
    service.client.search(secret)
    session = next(Path(arg.partition("=")[2]) for child in psutil.Process(service.process.pid).children(recursive=True)
                   for arg in _arguments(child) if arg.startswith("--session-dir="))  # fmt: skip
    logs = [service.log, *(path for path in (session / "logs").rglob("*") if path.is_file())]
    assert len(logs) > 5
    assert [path for path in logs if b"xylophonist" in path.read_bytes()] == []


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
