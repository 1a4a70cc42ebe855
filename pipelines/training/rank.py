"""What one rank holds while it trains, and how a run begins or is taken up again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from itm.data.plan import Position
from itm.distributed import rank, world_size
from itm.matchers.encoders.build import Encoder
from itm.matchers.encoders.features import remember_captions
from itm.teachers.online import OnlineTeachers
from itm.training.checkpoint import State, latest, load_checkpoint
from itm.training.freezing import in_steps
from itm.training.step import Step
from itm.training.switches import build_step
from pipelines.training.course import Course
from pipelines.training.job import Job, build_method
from pipelines.training.problems import Problems

if TYPE_CHECKING:
    from itm.tracking.runs import Tracker


@dataclass
class Rank:
    """One rank's part of a run. state is that of the last checkpoint plus what was logged and validated since; rank 0 has a tracker.

    unsaved: (2,) float64, the pairs that this rank has used and rejected since that checkpoint. waited: seconds of `clock` in which there
    was no batch yet. same_image: of the pairs that it has seen in this process, how many had another pair of their image in their batch,
    and all. told: the steps that the exporter knows of. given: of a mixture, the pairs that each root has given to this process.
    asked: how often the processes of this run asked a store again, and the seconds that passed, as last logged.
    """

    job: Job
    course: Course
    step: Step
    state: State
    clock: Stopwatch
    problems: Problems
    teachers: OnlineTeachers
    tracker: Tracker | None
    unsaved: Tensor
    waited: float = 0.0
    same_image: tuple[int, int] = (0, 0)
    told: int = 0
    given: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    asked: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @classmethod
    def restored(cls, job: Job, device: torch.device) -> Rank:
        """From the newest checkpoint of the job, or from its beginning. Raises ValueError for a checkpoint of other pairs or weights."""
        state = latest(job.checkpoints) or State(Position(), job.course.plan.digest(Position()))
        job.course.plan.check_digest(state.position, state.digest, f"checkpoint {state.position.step} of {job.folder}")
        # The ranks that are there: a resized worker group has others than the recipe names. They see the same pairs in the same order.
        course = job.course.taken_up(state.position, world_size())
        method = build_method(job.recipe, job.inputs)
        if job.recipe.data.cache_features and not job.recipe.train.compile:
            for encoder in method.matcher.layers():
                remember_captions(cast(Encoder, encoder), job.manifest.captions)
        step = build_step(method, in_steps(job.recipe.train, course.plan.steps_per_epoch), course.rate, job.recipe.seed, device)
        if state.position.step:
            load_checkpoint(job.checkpoints, state, step)
        return cls(
            job,
            course,
            step,
            state,
            Stopwatch(state.seconds),
            Problems(job.folder, job.manifest.samples, job.recipe.data.max_reject_rate, rank(), world_size()),
            OnlineTeachers(job.online, job.recipe.teachers.batch_size, device),
            _tracker(job, state) if rank() == 0 else None,
            torch.zeros(2, dtype=torch.float64),
            told=state.position.step,
        )

    @property
    def first(self) -> int:
        """The step at which this process took the run up."""
        return self.course.plan.start.step


def _tracker(job: Job, state: State) -> Tracker:
    """Of rank 0. The driver records the machine it is on; where GPUs are on others, rank 0 records its own.

    What an earlier process had queued when it ended is logged now, from the state.
    """
    from itm.tracking.addresses import answered  # here: the controller of a group and the other ranks need no MLflow, which takes a second
    from itm.tracking.loggers import loggers_of
    from itm.tracking.outages import fill
    from itm.tracking.runs import Tracker

    train = job.recipe.train
    node = "trainer" if train.use_gpu and train.workers else ""
    answered(job.tracking_uri)  # the driver has spoken with it
    tracker = Tracker.resume(job.run_id, job.tracking_uri, node, loggers_of(job.recipe, job.run_id))
    fill(tracker, state.losses, "train/")
    return tracker


class Stopwatch:
    """Seconds of training, over all restarts of a run; stopped during validation and checkpoints."""

    def __init__(self, before: float) -> None:
        self.before, self.finished = before, 0.0
        self.since: float | None = None

    def start(self) -> None:
        self.since = time.perf_counter()

    @property
    def here(self) -> float:
        """Of this process."""
        return self.finished + (time.perf_counter() - self.since if self.since else 0.0)

    @property
    def total(self) -> float:
        return self.before + self.here

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.finished, self.since = self.here, None
        try:
            yield
        finally:
            self.start()
