"""The service on real Ray Serve: answers, a moved alias and a killed replica, both without a failed request."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import itm
from itm.retrieval.engine import search
from itm.tracking.registry import crown
from pipelines.index import index
from pipelines.serving.client import ServiceRefused
from tests.support.serving_process import QUESTION, SCENES, Asking, replicas, until
from tests.support.serving_world import add_scenes, scenes

SWAPPED = 60.0  # seconds; 30 are promised, on a machine that has nothing else to do


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


def test_a_grown_index_is_served_without_a_failed_request(service: SimpleNamespace):
    add_scenes(service.shards, scenes(10, seed=9))
    with Asking(service.address, model="scan") as asking:
        index(replace(service.scanned, add=True))
        until(lambda: service.client.search(QUESTION, model="scan")["total"] == SCENES + 10, SWAPPED)
    assert asking.faults == []


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
