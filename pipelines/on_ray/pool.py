"""Actors that do one job after the other, in one process each; results come in the order of the jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipelines.on_ray.gpus import LINE, Seats, fetched

AHEAD = 2
"""Jobs that an actor has at a time: the next one's data travel while it computes."""
RETRIES = 3  # as Ray's tasks have: of an actor whose process or node is lost


class Holder:
    """An actor with what all of its jobs share, which it gets once."""

    def __init__(self, work: Callable[..., Any], shared: Any) -> None:
        self.work, self.shared = work, shared

    def ready(self) -> None:
        """Answers when the actor has its place and its process."""

    def do(self, job: tuple[Any, ...], *large: Any) -> Any:
        return self.work(self.shared, *job, *large)


class Pool:
    """Actors on `seats`, started one a job until all are taken; only those that have their place get jobs.

    work(shared, *job) is what they do. shared: a value, or Ray's promise of one.
    """

    def __init__(self, seats: Seats, cpus: float, work: Callable[..., Any], shared: Any) -> None:
        import ray

        self.seats, self.given = seats, (work, shared)
        self.kind: Any = ray.remote(num_cpus=cpus, num_gpus=seats.gpus, max_restarts=RETRIES, max_task_retries=RETRIES)(Holder)
        self.starting: dict[Any, Any] = {}  # promise -> actor
        self.running: dict[Any, Any] = {}
        self.load: dict[Any, int] = {}  # jobs of each actor that has its place

    def map(self, jobs: Iterable[tuple[tuple[Any, ...], tuple[Any, ...]]]) -> Iterator[Any]:
        """A job is (small values, values that may be promises of Ray's store). Raises what a job raised."""
        order: deque[Any] = deque()
        for job in jobs:
            actor = self._free()
            promise = actor.do.remote(job[0], *job[1])
            self.running[promise] = actor
            self.load[actor] += 1
            order.append(promise)
            while order and order[0] not in self.running:
                yield fetched(order.popleft())
        while order:
            yield fetched(order.popleft())

    def _free(self) -> Any:
        if len(self.starting) + len(self.load) < self.seats.count:
            actor = self.kind.remote(*self.given)
            self.starting[actor.ready.remote()] = actor
        self._note(0)
        while min(self.load.values(), default=AHEAD) >= AHEAD:
            self._note(LINE)
        return min(self.load, key=lambda actor: self.load[actor])

    def _note(self, seconds: float) -> None:
        """Take note of actors that are ready and of jobs that are done; wait for one of them up to so many seconds."""
        import ray

        promises = [*self.starting, *self.running]
        done, _ = ray.wait(promises, num_returns=1 if seconds else len(promises), timeout=seconds, fetch_local=False)
        for promise in done:
            if promise in self.starting:
                fetched(promise)
                self.load[self.starting.pop(promise)] = 0
            else:
                self.load[self.running.pop(promise)] -= 1
        if seconds and not done and not self.load:
            print(f"waiting for a place for an actor with {self.seats.gpus:g} GPUs: all are taken", flush=True)
