"""What each training worker does: restore the newest checkpoint, stream its share of the plan, step, and finish.

The same function runs as a Ray Train worker and inside the driver (`train.workers=0`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from itm.data.arrow import Columns
from itm.data.buffers import Buffers
from itm.data.collate import to_batch
from itm.data.formats import Json
from itm.data.mix import Mixture
from itm.data.pairs import Pairs
from itm.device import is_lost
from itm.distributed import all_reduce_max, rank, world_size
from itm.training.loop import Hooks, train_loop
from itm.types import Batch
from pipelines.on_ray.feeding import Feeders, feeders
from pipelines.on_ray.stream import MOST_DECODERS, decoders, stream, stream_auto, stream_here, work_of
from pipelines.training.ending import Ending
from pipelines.training.job import Job
from pipelines.training.moments import Report, checkpoint, finish, log, validate
from pipelines.training.rank import Rank
from pipelines.training.startup import StartUp

LOST = 74
"""Exit code of a worker whose device is lost (EX_IOERR)."""
BESIDE = 7
"""Batches in memory beside one a decoding thread: those that are ready, that of the step, and one that is being let go."""


def work(job: Job, device: torch.device, report: Report, startup: StartUp | None = None) -> Json:
    """Train to the end of the run; returns the summary of `finish`, on rank 0. Raises OSError where the device is lost.

    startup: what came before, which rank 0 reports after its first step.
    """
    with ended_with_its_device(own_process=job.recipe.train.workers > 0):
        return _work(job, device, report, startup or StartUp())


@contextmanager
def ended_with_its_device(own_process: bool) -> Iterator[None]:
    """A worker's process ends where its device is lost: only another process gets a working one, and Ray Train starts it
    (`train.max_failures`). Where the process is the user's it raises OSError."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        said = f"the device is lost: {str(error).splitlines()[0]}"
        if own_process:
            print(f"{said}; this worker ends, train.max_failures says how often another may take its place", file=sys.stderr, flush=True)
            os._exit(LOST)  # not by an exception: the end of a process group would wait for the device
        raise OSError(f"{said}; run the same command again, it goes on from the last checkpoint") from error


def _work(job: Job, device: torch.device, report: Report, startup: StartUp) -> Json:
    here = Rank.restored(job, device)
    startup.reached("model")
    course, ending = here.course, Ending(here)
    hooks = Hooks(
        partial(log, here, report),
        partial(validate, here),
        partial(checkpoint, here),
        logs=course.logs,
        validates=course.validates,
        checkpoints=course.checkpoints,
        ends=ending,
    )
    done = here.first
    if not ending.before_its_first_step():
        done = train_loop(here.step, batches(here, report, startup), here.first, course.steps, hooks)
    if ending.why and here.tracker:
        report(done, ending.why, {})
    return finish(here, done, ending.why)


def batches(here: Rank, report: Report, startup: StartUp) -> Iterator[Batch]:
    """The batches of this rank. What is read is what was planned (else RuntimeError); what was rejected is written down."""
    plan, accumulate = here.course.plan, here.course.train.accumulate
    for n, columns in enumerate(_timed(columns_of(here, report), here)):
        expected = plan.start.step + n // accumulate
        rows, found = len(columns["key"]), int(columns["step"][0])
        if found != expected or rows != plan.batch:
            raise RuntimeError(f"the stream gave {rows} rows of step {found} where {plan.batch} of step {expected} were due")
        left_out = [problem for problem in columns["problem"] if problem is not None]
        here.problems.add(left_out)
        here.unsaved += torch.tensor([rows - len(left_out), len(left_out)])
        if isinstance(here.job.manifest, Mixture):
            _count_roots(here, here.job.manifest, n, [problem is None for problem in columns["problem"]])
        _, which, times = np.unique(columns["image_id"], return_inverse=True, return_counts=True)
        here.same_image = (here.same_image[0] + int((times[which] > 1).sum()), here.same_image[1] + rows)
        if n == 0:
            startup.reached("data")
        yield here.teachers.taught(to_batch(columns), columns)
        if n == accumulate - 1 and rank() == 0 and not here.first:  # a group that starts again has other parts
            startup.reached("step")
            report(here.first + 1, str(startup))


def _count_roots(here: Rank, mixture: Mixture, n: int, good: list[bool]) -> None:
    """Add the pairs of batch `n` that can be used to those that their roots have given."""
    step, micro = divmod(n, here.course.train.accumulate)
    pairs = here.course.plan.batch_pairs(here.course.plan.start.step + step, micro, rank())
    counts = np.bincount(mixture.root_of(pairs[np.array(good), 0]), minlength=len(mixture.uris))
    here.given = torch.tensor(counts, dtype=torch.float64) + (here.given if len(here.given) else 0.0)


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


def columns_of(here: Rank, report: Report) -> Iterator[Columns]:
    """The same batches as columns: through Ray Data, or read by threads of this process."""
    job, course, data = here.job, here.course, here.job.recipe.data
    items = work_of(rank(), here.first, course.steps, course.train.accumulate)
    pairs = Pairs(job.split(data.train_split), job.manifest, course.plan, job.inputs, job.stores, here.teachers.prepare)
    threads = decoders(data.decode_workers, course.train.use_gpu)
    pairs.buffers = Buffers(threads + BESIDE)
    if not course.train.workers:
        return stream_here(pairs, items, threads)
    if data.decode != "auto":
        return stream(pairs, items, data.decode, threads)
    find = partial(_feeders, course.train.use_gpu, data.decode_workers)

    def say(step: int, text: str) -> None:
        if rank() == 0:
            report(step, text, {})

    def most(share: float) -> float:
        return float(all_reduce_max(torch.tensor(share, device=here.step.device)))

    return stream_auto(pairs, items, threads, find, say, most)


def _feeders(gpu: bool, wanted: int | None) -> Feeders:
    import ray

    return feeders(ray.nodes(), gpu, world_size(), MOST_DECODERS, wanted)
