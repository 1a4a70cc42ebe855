"""Who decodes where the recipe leaves it open (`data.decode=auto`): a trainer's own threads, or actors on nodes that have no trainer.

A trainer begins with threads of its own. Over some batches it measures how much of the time they are busy, which is
`decoding seconds of a batch x batches a second / threads`: at `BUSY` or more, in any trainer, they are what all trainers wait for. Then
actors on the nodes that can feed them take over: those with CPUs and no GPU where training is on GPUs, and those with the label
`itm/feeds=true`, which get no trainer. The pairs, their order and their pixels are the same for both, so a run can go from one to the
other at any batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

LABEL = "itm/feeds"
WARM, PROBE = 8, 16
"""Batches before the measurement, in which the threads fill what is read ahead, and batches of the measurement."""
HANDOVER = 16
"""Batches that the trainer still decodes itself while the actors start."""
BUSY = 0.9

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Feeders:
    """Nodes that can decode for the trainers of a run: their addresses, and how many actors there are for each trainer."""

    nodes: dict[str, str]
    actors: int

    @property
    def options(self) -> dict[str, Any]:
        """Where Ray puts the actors; anywhere once none of the nodes is left."""
        return {"label_selector": {"ray.io/node-id": f"in({','.join(self.nodes)})"}, "fallback_strategy": [{"label_selector": {}}]}


def feeders(nodes: Sequence[dict[str, Any]], gpu: bool, trainers: int, most: int, wanted: int | None = None) -> Feeders:
    """Those among `ray.nodes()`; an actor for each of their CPUs, shared by the trainers, at most `most`. wanted: data.decode_workers."""
    found = [node for node in nodes if node["Alive"] and _feeds(node, gpu)]
    cpus = int(sum(node["Resources"].get("CPU", 0.0) for node in found))
    return Feeders({node["NodeID"]: node["NodeManagerAddress"] for node in found}, wanted or min(most, max(1, cpus // trainers)))


def _feeds(node: dict[str, Any], gpu: bool) -> bool:
    if not node["Resources"].get("CPU", 0.0):
        return False
    return node["Labels"].get(LABEL) == "true" or (gpu and not node["Resources"].get("GPU", 0.0))


def away_from_feeders(nodes: Sequence[dict[str, Any]]) -> dict[str, str] | None:
    """A label selector that keeps trainers off the nodes that only feed; None where there are none."""
    return {LABEL: "!true"} if any(node["Alive"] and node["Labels"].get(LABEL) == "true" for node in nodes) else None


class Watched:
    """A function, and how many seconds its callers have spent in it, over all threads."""

    def __init__(self, function: Callable[[A], B]) -> None:
        self.function: Callable[..., Any] = function
        self.seconds, self.lock = 0.0, threading.Lock()

    def __call__(self, given: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self.function(given)
        finally:
            with self.lock:
                self.seconds += time.perf_counter() - begin


def measured(batches: Iterator[B], watched: Watched, threads: int, wait: Callable[[], None]) -> Iterator[tuple[B, float | None]]:
    """The batches, each with None; when WARM + PROBE of them were used, the next with the share of time in which the threads were busy.

    wait: returns when the device has done what it was given, so that a GPU is not taken for faster than it is.
    """
    begin, before, share = 0.0, 0.0, None
    for number, batch in enumerate(batches):
        if number == WARM:
            begin, before = time.perf_counter(), watched.seconds
        elif number == WARM + PROBE:
            share = (watched.seconds - before) / (threads * (time.perf_counter() - begin))
        yield batch, share
        share = None
        if WARM <= number + 1 <= WARM + PROBE:
            wait()


def words(share: float, threads: int, found: Feeders, moves: bool) -> str:
    """What was decided, and why."""
    busy = f"data.decode=auto: {threads} decoding threads of a trainer were busy {int(100 * share)}% of the time"
    if moves:
        return f"{busy}, so {found.actors} actors a trainer decode on {', '.join(sorted(found.nodes.values()))}"
    if share < BUSY:
        return f"{busy}, so they go on: less than {BUSY:.0%}"
    return f"{busy}, and go on: no node is there to decode for it (CPUs beside GPU nodes, or a node with the label {LABEL}=true)"
