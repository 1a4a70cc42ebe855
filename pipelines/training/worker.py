"""What each training worker does: restore the newest checkpoint, stream its share of the plan, step, and finish.

The same function runs as a Ray Train worker and inside the driver (`train.workers=0`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch

from itm.data.arrow import Columns
from itm.data.collate import to_batch
from itm.data.formats import Json
from itm.data.pairs import Pairs
from itm.distributed import rank
from itm.training.loop import Hooks, train_loop
from itm.types import Batch
from pipelines.on_ray.stream import stream, stream_here, work_of
from pipelines.training.job import Job
from pipelines.training.moments import Report, checkpoint, finish, log, validate
from pipelines.training.rank import Rank


def work(job: Job, device: torch.device, report: Report) -> Json:
    """Train to the end of the run; returns the summary of `finish`, on rank 0."""
    here = Rank.restored(job, device)
    course = here.course
    hooks = Hooks(
        partial(log, here, report),
        partial(validate, here),
        partial(checkpoint, here),
        logs=course.logs,
        validates=course.validates,
        checkpoints=course.checkpoints,
    )
    train_loop(here.step, batches(here), here.first, course.steps, hooks)
    return finish(here)


def batches(here: Rank) -> Iterator[Batch]:
    """The batches of this rank. What is read is what was planned (else RuntimeError); what was rejected is written down."""
    plan = here.course.plan
    for n, columns in enumerate(_timed(columns_of(here), here)):
        expected = plan.start.step + n // here.course.train.accumulate
        rows, found = len(columns["key"]), int(columns["step"][0])
        if found != expected or rows != plan.batch:
            raise RuntimeError(f"the stream gave {rows} rows of step {found} where {plan.batch} of step {expected} were due")
        left_out = [problem for problem in columns["problem"] if problem is not None]
        here.problems.add(left_out)
        here.unsaved += torch.tensor([rows - len(left_out), len(left_out)])
        yield to_batch(columns)


def _timed(columns: Iterator[Columns], here: Rank) -> Iterator[Columns]:
    """The clock starts with the first batch: the start of the preprocessing actors is no training."""
    asked: float | None = None
    for batch in columns:
        if asked is None:
            here.clock.start()
        else:
            here.waited += time.perf_counter() - asked
        yield batch
        asked = time.perf_counter()


def columns_of(here: Rank) -> Iterator[Columns]:
    """The same batches as columns: through Ray Data, or read by threads of this process."""
    job, course, data = here.job, here.course, here.job.recipe.data
    items = work_of(rank(), here.first, course.steps, course.train.accumulate)
    pairs = Pairs(job.split(data.train_split), job.manifest, course.plan, job.inputs, job.stores)
    if course.train.workers:
        return stream(pairs, items, data.decode, data.decode_workers)
    return stream_here(pairs, items, data.decode_workers)
