"""What each training worker does: build the method, restore the newest checkpoint, stream its share of the plan, step.

The same function runs as a Ray Train worker and inside the driver (`train.workers=0`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from itm.config import Recipe, Train
from itm.data import files
from itm.data.arrow import Columns
from itm.data.collate import to_batch
from itm.data.manifest import Manifest
from itm.data.pairs import Pairs
from itm.data.plan import Plan, Position
from itm.data.preprocess import Inputs
from itm.data.sidecar import Store
from itm.distributed import all_reduce_sum, rank, world_size
from itm.evaluation.dataset import encode_split
from itm.evaluation.metrics import retrieval_metrics
from itm.evaluation.scoring import score_matrix
from itm.kinds import build_part
from itm.matchers.folder import build_matcher, save_matcher, take_weights
from itm.methods import METHODS
from itm.tracking.registry import Tracker
from itm.training.checkpoint import Best, State, best_uri, latest, load_checkpoint, read_weights, save_checkpoint, write_weights
from itm.training.compiled import as_written
from itm.training.loop import Hooks, train_loop
from itm.training.optim import learning_rate, scalars
from itm.training.switches import build_step
from itm.types import Batch, Method
from pipelines.on_ray.stream import stream, stream_here, work_of

START = "start"  # the matcher that a run fine-tunes, copied into its folder: an alias may move while it trains
Report = Callable[[int, float], None]
"""(steps done, loss), called on rank 0 at every logged step."""


@dataclass(frozen=True)
class Job:
    """A checked training run. Every path in it is absolute: a Ray worker has another working directory."""

    recipe: Recipe
    manifest: Manifest
    plan: Plan
    inputs: Inputs
    stores: dict[str, Store]
    steps: int
    run_id: str
    tracking_uri: str

    @property
    def folder(self) -> str:
        return self.recipe.folder

    @property
    def checkpoints(self) -> str:
        return files.join(self.folder, "checkpoints")

    def split(self, name: str) -> str:
        return files.join(self.recipe.data.root, name)


def build_method(recipe: Recipe, inputs: Inputs) -> Method:
    """The method around a matcher, fresh (the same weights for the same seed) or with the weights of `train.start`.

    Raises ValueError for what cannot run together.
    """
    torch.manual_seed(recipe.seed)
    matcher = build_matcher(recipe.model, inputs)
    if recipe.train.start:
        take_weights(matcher, files.join(recipe.folder, START))
    method: Method = build_part(METHODS, recipe.method.kind, recipe.method.options, "method", matcher=matcher)
    return method


def last_step(train: Train, plan: Plan) -> int:
    """Steps of the whole run when the ranks of `plan` take it to its end; passes over the captions last as many pairs for any of them.

    Raises ValueError when the recipe does not say how long to train.
    """
    ends = [train.steps] if train.steps else []
    if train.epochs:
        passes = (plan.pairs - plan.start.offset) // plan.global_batch + (train.epochs - plan.start.epoch - 1) * plan.steps_per_epoch
        ends.append(plan.start.step + max(0, passes))
    if not ends:
        raise ValueError("the recipe does not say how long to train: set train.steps or train.epochs")
    return min(ends)


def work(job: Job, device: torch.device, report: Report) -> dict[str, Any]:
    """Train to the end of the run; returns what rank 0 knows: steps, seconds, samples_per_s, best, rejected."""
    worker = Worker(job, device, report)
    worker.train()
    return worker.finish()


class Worker:
    """One rank's state between hooks."""

    def __init__(self, job: Job, device: torch.device, report: Report) -> None:
        self.job, self.report = job, report
        train, recipe = job.recipe.train, job.recipe
        self.state = latest(job.checkpoints) or State(Position(), job.plan.digest(Position()))
        job.plan.check_digest(self.state.position, self.state.digest, f"checkpoint {self.state.position.step} of {job.folder}")
        # The ranks that are there: a resized worker group has others than the recipe names. They see the same pairs in the same order.
        self.plan = replace(job.plan, ranks=world_size()).resume(self.state.position)
        self.steps = last_step(train, self.plan)
        self.step = build_step(build_method(recipe, job.inputs), train, self._rate, recipe.seed, device)
        if self.state.position.step:
            load_checkpoint(job.checkpoints, self.state, self.step)
        self.tracker = Tracker.resume(job.run_id, job.tracking_uri) if rank() == 0 else None
        self.clock = Clock(self.state.seconds)
        self.problems = Problems(job, rank(), world_size())
        self.rejected = 0
        self.seen = torch.zeros(2, dtype=torch.float64)  # pairs (used, rejected) of this rank since the last checkpoint

    def _rate(self, step: int) -> float:
        """Where passes end the run they drive the schedule too: a step of other workers is another share of a pass."""
        train, plan, end = self.job.recipe.train, self.plan, self.steps
        if train.epochs and not train.steps:
            at, end = plan.locate(step), train.epochs * plan.steps_per_epoch
            step = at.epoch * plan.steps_per_epoch + at.offset // plan.global_batch
        return learning_rate(train, step, plan.steps_per_epoch, end)

    def train(self) -> None:
        train = self.job.recipe.train
        hooks = Hooks(
            self._log,
            self._validate,
            self._checkpoint,
            logs=lambda done: done % train.log_every == 0 or done == self.steps,
            validates=self._validates,
            checkpoints=self._checkpoints,
        )
        train_loop(self.step, self._checked(), self.state.position.step, self.steps, hooks)

    def _stream(self) -> Iterator[Columns]:
        job, data, train = self.job, self.job.recipe.data, self.job.recipe.train
        items = work_of(rank(), self.state.position.step, self.steps, train.accumulate)
        pairs = Pairs(job.split(data.train_split), job.manifest, self.plan, job.inputs, job.stores)
        if train.workers:
            return stream(pairs, items, data.decode, data.decode_workers)
        return stream_here(pairs, items, data.decode_workers)

    def _checked(self) -> Iterator[Batch]:
        """What is read is what was planned; what was rejected is written down."""
        accumulate = self.job.recipe.train.accumulate
        for n, columns in enumerate(self._stream()):
            if n == 0:
                self.clock.start()  # the start of the preprocessing actors is no training
            expected = self.plan.start.step + n // accumulate
            rows, found = len(columns["key"]), int(columns["step"][0])
            if found != expected or rows != self.plan.batch:
                raise RuntimeError(f"the stream gave {rows} rows of step {found} where {self.plan.batch} of step {expected} were due")
            left_out = [problem for problem in columns["problem"] if problem is not None]
            self.problems.add(left_out)
            self.seen += torch.tensor([rows - len(left_out), len(left_out)])
            yield to_batch(columns)

    def _ends_epoch(self, done: int) -> bool:
        return self.plan.locate(done).epoch > self.plan.locate(done - 1).epoch

    def _validates(self, done: int) -> bool:
        every = self.job.recipe.train.validate_every
        return done == self.steps or (done % every == 0 if every else self._ends_epoch(done))

    def _checkpoints(self, done: int) -> bool:
        every = self.job.recipe.train.checkpoint_every
        return done == self.steps or (done % every == 0 if every else self._validates(done))

    def _log(self, done: int, losses: dict[str, float]) -> None:
        self.rejected = int(all_reduce_sum(torch.tensor(float(len(self.problems.rows)), device=self.step.device)))
        rates = {"lr": self._rate(done - 1), "samples_per_s": self._speed(done), "rejected": float(self.rejected)}
        values = losses | rates | dict(scalars(self.step.plain))
        self.state = replace(self.state, losses=(*self.state.losses, {"step": done, **values}))
        if self.tracker:
            self.tracker.metrics(values, step=done)
            self.report(done, losses["loss"])

    def _speed(self, done: int) -> float:
        """Pairs of all ranks a second, in this process's share of the run, validation and checkpoints not counted."""
        return (done - self.plan.start.step) * self.plan.global_batch / max(self.clock.here, 1e-9)

    def _validate(self, done: int) -> None:
        """On rank 0; the others wait for it in the next step."""
        data, evaluation = self.job.recipe.data, self.job.recipe.evaluation
        if not data.val_split:
            return
        with self.clock.stopped(), self.step.whole() as method, as_written(self.job.recipe.train.compile):
            if rank():
                return
            matcher: Any = method.matcher
            encoded = encode_split(
                matcher,
                self.job.split(data.val_split),
                evaluation.batch_size,
                device=self.step.device,
                max_reject_rate=data.max_reject_rate,
            )
            scores = score_matrix(matcher, encoded.images, encoded.captions, block=evaluation.block, device=self.step.device)
            metrics = retrieval_metrics(scores, encoded.positives)
            assert self.tracker is not None
            self.tracker.metrics({f"val_{name}": value for name, value in metrics.items()}, step=done)
            if self.state.best is None or metrics["rsum"] > self.state.best.metrics["rsum"]:
                best = Best(done, metrics)
                write_weights(best_uri(self.job.checkpoints, best), matcher)
                self.state = replace(self.state, best=best)

    def _checkpoint(self, done: int) -> None:
        self.problems.write()
        used, rejected = map(int, all_reduce_sum(self.seen.to(self.step.device)).tolist())
        self.seen.zero_()
        with self.clock.stopped():
            position = self.plan.locate(done)
            pairs = self.state.pairs + (done - self.state.position.step) * self.plan.global_batch
            self.state = replace(self.state, position=position, digest=self.plan.digest(position), seconds=self.clock.total, pairs=pairs)
            self.state = replace(self.state, used=self.state.used + used, rejected=self.state.rejected + rejected)
            if self.state.used + self.state.rejected != pairs:
                raise RuntimeError(
                    f"{pairs} pairs were planned, {self.state.used} used and {self.state.rejected} rejected up to step {done}"
                )
            rows = "".join(json.dumps(row) + "\n" for row in self.state.losses)
            if rank() == 0:
                files.write_atomic(files.join(self.job.folder, "losses.jsonl"), rows.encode())
            save_checkpoint(self.job.checkpoints, self.state, self.step)

    def finish(self) -> dict[str, Any]:
        """Rank 0 writes the matcher folder: the best validated weights, or the last ones without a validation split."""
        matcher: Any = self.step.gathered(self.step.kept).matcher
        if rank():
            return {}
        assert self.tracker is not None
        if self.state.best is not None:
            read_weights(best_uri(self.job.checkpoints, self.state.best), matcher)
        save_matcher(matcher.cpu(), files.join(self.job.folder, "matcher"))
        self.tracker.close()
        best = {"step": self.state.best.step, "metrics": self.state.best.metrics} if self.state.best else None
        seconds = self.state.seconds
        speed = self.state.pairs / seconds if seconds else 0.0
        return {
            "steps": self.steps,
            "seconds": round(seconds, 2),
            "samples_per_s": round(speed, 2),
            "best": best,
            "rejected": self.rejected,
            "rows_in": self.state.pairs,
            "rows_out": self.state.used,
            "rows_rejected": self.state.rejected,
        }


class Clock:
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


class Problems:
    """The rejected pairs that a rank has met, each once; `quarantine-<rank>.jsonl` in the run's folder."""

    def __init__(self, job: Job, rank: int, ranks: int) -> None:
        self.uri = files.join(job.folder, f"quarantine-{rank}.jsonl")
        self.samples, self.limit = job.manifest.samples, job.recipe.data.max_reject_rate
        self.rows: dict[str, None] = {}
        if files.exists(self.uri):
            self._read(self.uri)
        self.written = len(self.rows)
        if rank == 0:
            self._adopt(job.folder, ranks)

    def _read(self, uri: str) -> None:
        self.rows |= dict.fromkeys(files.read_bytes(uri).decode().splitlines())

    def _adopt(self, folder: str, ranks: int) -> None:
        """Take over the lists of ranks that there are no longer: what they met counts as well."""
        lists = {name: re.fullmatch(r"quarantine-(\d+)\.jsonl", name) for name in files.sizes(folder, ".jsonl")}
        left = [files.join(folder, name) for name, found in lists.items() if found and int(found[1]) >= ranks]
        for uri in left:
            self._read(uri)
        self.write()
        for uri in left:
            files.delete(uri)

    def add(self, rows: list[str]) -> None:
        """Raises ValueError when more samples of the split were rejected than `data.max_reject_rate` allows."""
        new = [row for row in rows if row not in self.rows]
        if not new:
            return
        self.rows |= dict.fromkeys(new)
        keys = {json.loads(row)["key"] for row in self.rows}
        if len(keys) > self.limit * self.samples:
            self.write()
            raise ValueError(
                f"{len(keys)} of {self.samples} samples were rejected, more than data.max_reject_rate={self.limit}; "
                f"the reasons are in {self.uri}; the last: {new[-1]}"
            )

    def write(self) -> None:
        if len(self.rows) > self.written:
            files.write_atomic(self.uri, "".join(row + "\n" for row in self.rows).encode())
            self.written = len(self.rows)


def absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())
