from __future__ import annotations

import time
from collections.abc import Iterator

from pipelines.on_ray.feeding import BUSY, LABEL, PROBE, WARM, Watched, away_from_feeders, feeders, measured
from pipelines.on_ray.stream import in_threads


def node(name: str, cpus: float, gpus: float = 0, label: str = "", alive: bool = True) -> dict[str, object]:
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return {"NodeID": name, "NodeManagerAddress": name, "Alive": alive, "Resources": resources, "Labels": {LABEL: label} if label else {}}


def test_gpu_trainers_are_fed_by_nodes_without_gpus_and_cpu_trainers_by_those_with_the_label() -> None:
    nodes = [node("head", 0), node("a", 8, gpus=2), node("b", 6), node("c", 4, label="true"), node("gone", 64, label="true", alive=False)]
    found = feeders(nodes, gpu=True, trainers=2, most=16)
    assert (set(found.nodes), found.actors) == ({"b", "c"}, 5)
    found = feeders(nodes, gpu=False, trainers=2, most=16)
    assert (set(found.nodes), found.actors) == ({"c"}, 2)
    assert feeders(nodes, gpu=False, trainers=2, most=16, wanted=7).actors == 7
    assert feeders(nodes, gpu=True, trainers=1, most=3).actors == 3
    assert feeders(nodes[:2], gpu=True, trainers=2, most=16).nodes == {}
    assert (away_from_feeders(nodes), away_from_feeders(nodes[:3])) == ({LABEL: "!true"}, None)


def share(prepare: float, step: float, threads: int) -> float:
    """How busy threads are found that take `prepare` seconds for a batch of which the trainer uses one in `step` seconds."""
    prepared = Watched(lambda item: time.sleep(prepare))
    own: Iterator[None] = in_threads(prepared, range(WARM + PROBE + 1), threads)
    found = []
    for _, busy in measured(own, prepared, threads, lambda: None):
        time.sleep(step)
        found.append(busy)
    assert found[:-1] == [None] * (WARM + PROBE)
    return float(found[-1] or 0)


def test_threads_that_the_trainer_waits_for_are_found_busy_and_others_are_not() -> None:
    assert share(prepare=0.01, step=0.0, threads=1) > BUSY
    assert 0.2 < share(prepare=0.01, step=0.025, threads=1) < BUSY
