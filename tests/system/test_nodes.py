"""A node of a Ray cluster dies in mid-training and another takes over, or none does: not one bit is lost. Nodes are processes here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from itm.config import Recipe
from itm.data.shards import read_manifest
from itm.tracking.runs import Tracker
from itm.training.checkpoint import State, latest
from pipelines.train import train
from pipelines.training.job import Job
from pipelines.training.preparation import prepare
from pipelines.training.worker import work
from tests.support.node_cluster import Cluster
from tests.support.ranks import joined, spawn_ranks
from tests.support.small_training import final, recipe, same, splits

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e

TRAIN = "import sys; from pipelines.cli import stage_main; sys.exit(stage_main('train', ['-c', sys.argv[1]]))"


def until(reached: Callable[[], Any], log: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, f"nothing in {seconds} s: {log.read_text()[-3000:]}"
        time.sleep(0.1)


@pytest.fixture
def cluster(registry: Path, tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path)
    try:
        yield found
    finally:
        found.stop()


def training(cluster: Cluster, log: Path, path: Path, code: str = TRAIN, **environment: str) -> subprocess.Popen[bytes]:
    """A driver on the head that trains a recipe."""
    environment |= {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    with log.open("wb") as out:
        command = [sys.executable, "-c", code, str(path)]
        return subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=out)


def one_of_two(rank: int, port: int, job: Job) -> None:
    """What a worker of Ray Train does, without Ray."""
    with joined(rank, port, 2):
        work(job, torch.device("cpu"), lambda *said: None)


def train_without_ray(choices: Recipe) -> None:
    """Two ranks as two processes: nothing to disturb them, and far fewer processes than a worker group of Ray has."""
    job = prepare(choices, read_manifest(f"{choices.data.root}/train"))
    alone = choices.model_copy(update={"train": choices.train.model_copy(update={"workers": 0})})
    with Tracker.start("tests", choices.name) as tracker:
        job = replace(job, recipe=alone, run_id=tracker.run_id, tracking_uri=tracker.uri)
        spawn_ranks(one_of_two, 2, job)


def test_another_node_takes_over_from_one_that_dies_bit_for_bit(cluster: Cluster, tmp_path: Path) -> None:
    """One worker on the head, one on the node that will die: a third node joins only when both have their places."""
    splits(tmp_path, shards=1, samples=24)
    steps = 400  # more than are done while the third node joins
    given: dict[str, Any] = {"workers": 2, "batch_size": 3, "steps": steps, "validate_every": steps, "max_failures": 1}
    path, checkpoints = tmp_path / "killed.json", tmp_path / "runs" / "killed" / "checkpoints"
    path.write_text(recipe(tmp_path, name="killed", **given).model_dump_json())
    _, victim, log = cluster.start(cpus=1), cluster.start(cpus=1), tmp_path / "train.log"
    driver = training(cluster, log, path)
    try:
        until(lambda: cluster.processes(victim, "RayTrainWorker"), log, driver)
        cluster.start(cpus=2)
        until(lambda: any(int(kept.stem) >= 4 for kept in checkpoints.glob("0*.json")), log, driver)
        cluster.lose(victim)
        assert not (checkpoints / f"{steps:09}.json").exists(), "it died too late"
        assert driver.wait(120) == 0, log.read_text()[-3000:]
    finally:
        driver.kill()
        driver.wait()
    cluster.stop()
    train_without_ray(recipe(tmp_path, name="whole", **given))
    assert same(final(tmp_path, "killed", steps), final(tmp_path, "whole", steps))


def test_the_workers_that_are_left_finish_every_pass_when_no_node_takes_over(cluster: Cluster, tmp_path: Path) -> None:
    """One of two workers goes on from the last checkpoint, where a run of one process, given a copy of it, goes on as well."""
    splits(tmp_path, shards=1, samples=24)
    folder, log, epochs = tmp_path / "runs" / "shrunk", tmp_path / "train.log", 8
    given: dict[str, Any] = {"batch_size": 3, "steps": None, "epochs": epochs, "data": {"val_split": ""}}
    path = tmp_path / "shrunk.json"
    path.write_text(recipe(tmp_path, name="shrunk", workers=2, min_workers=1, max_failures=1, **given).model_dump_json())
    head, victim = cluster.start(cpus=1), cluster.start(cpus=1)
    driver = training(cluster, log, path, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="3")  # else it waits a minute for another node
    try:
        until(lambda: cluster.processes(victim, "RayTrainWorker"), log, driver)
        until(lambda: (folder / "checkpoints" / "000000004.json").exists(), log, driver)
        left = cluster.processes(head, "RayTrainWorker")
        assert len(left) == 1
        cluster.lose(victim)
        until(lambda: not any(process.is_running() for process in left), log, driver)
        shutil.copytree(folder / "checkpoints", tmp_path / "runs" / "copy" / "checkpoints")
        assert driver.wait(120) == 0, log.read_text()[-3000:]
    finally:
        driver.kill()
        driver.wait()
    before, shrunk = whole(tmp_path, "copy"), whole(tmp_path, "shrunk")
    pairs = epochs * 48
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(recipe(tmp_path, name="copy", workers=0, **given))
    finally:
        torch.set_num_threads(threads)
    copy = whole(tmp_path, "copy")
    assert 4 <= before.position.step < 8 * epochs, "it died too late"
    assert shrunk.position.step == before.position.step + (pairs - before.pairs) // 3
    assert (shrunk.position, shrunk.digest, shrunk.pairs, shrunk.used) == (copy.position, copy.digest, pairs, pairs)
    assert shrunk.position.epoch == epochs
    assert same(final(tmp_path, "shrunk", shrunk.position.step), final(tmp_path, "copy", shrunk.position.step))


def whole(root: Path, name: str) -> State:
    found = latest(str(root / "runs" / name / "checkpoints"))
    assert found is not None
    return found


# Ray Train looks for room once a minute; a test looks every two seconds.
IMPATIENT = """import functools; import ray.train
ray.train.ScalingConfig = functools.partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=2)
"""


def test_a_run_that_began_with_too_few_nodes_grows_when_another_joins(cluster: Cluster, tmp_path: Path) -> None:
    """One worker holds the only CPU; a second one takes half of the pairs from a checkpoint on, and none is lost or taken twice."""
    splits(tmp_path, shards=1, samples=24)
    log, epochs = tmp_path / "train.log", 60
    given: dict[str, Any] = {"batch_size": 3, "steps": None, "epochs": epochs, "data": {"val_split": ""}}
    path = tmp_path / "grown.json"
    path.write_text(recipe(tmp_path, name="grown", workers=2, min_workers=1, max_failures=1, **given).model_dump_json())
    head = cluster.start(cpus=1)
    driver = training(cluster, log, path, code=IMPATIENT + TRAIN, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="3")
    try:
        until(lambda: cluster.processes(head, "RayTrainWorker"), log, driver)  # a group of one: it waits for all
        joined = cluster.start(cpus=1)
        until(lambda: cluster.processes(joined, "RayTrainWorker"), log, driver)
        assert driver.wait(120) == 0, log.read_text()[-3000:]
    finally:
        driver.kill()
        driver.wait()
    grown = whole(tmp_path, "grown")
    assert (grown.pairs, grown.used, grown.position.epoch) == (epochs * 48, epochs * 48, epochs)
    assert grown.position.step < epochs * 16, "it never had two workers"
