"""Experiment tracking: runs of MLflow.

    with Tracker.start("itm", "demo", recipe.flat(), datasets=[DatasetRef("train", manifest.fingerprint(), uri)]) as tracker:
        tracker.metrics({"train/loss": 0.7}, step=1)

Only client objects with an explicit address are used, never MLflow's process-wide state, so that a Ray worker, a
notebook and a test in one process cannot write into each other's runs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlparse

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from itm.data import files
from itm.tracking import drivers
from itm.tracking.addresses import folder_uri, opening, shown, sqlite_path, tracking_uri
from itm.tracking.lineage import LONGEST_PARAM, DatasetRef, git_commit, plain_name, shorten, texts, whole_environment
from itm.tracking.loggers import Logger
from itm.tracking.outages import note_waits, told_at_last

_PARAMS_PER_CALL = 100  # MLflow's own limit
_MOST_PENDING = 512
_opened: set[str] = set()  # SQLite addresses of this process
DESCRIPTION = "mlflow.note.content"  # the tag that MLflow shows as the description
RECIPE = "recipe.yaml"  # the artifact of a training's run


def client(uri: str | None = None) -> MlflowClient:
    """A client of the tracking server and registry at `uri` (default `tracking_uri()`). Raises DeadTracking when nobody answers there."""
    uri = uri or tracking_uri()
    with opening(uri):
        door = MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)
        if sqlite_path(uri) and uri not in _opened:
            door.search_registered_models(max_results=1)  # opens the registry, which has a connection of its own, as well
            _opened.add(uri)
    return door


class Tracker:
    """One MLflow run. `start` opens it, `resume` writes into it from another process; metrics go out asynchronously.

    As a context manager, a started run ends FINISHED or FAILED; a resumed one is only flushed: who opened it ends it.
    """

    def __init__(self, run_id: str, uri: str, owner: bool, system_metrics: bool, loggers: Sequence[Logger] = (), node: str = "") -> None:
        self.run_id = run_id
        self.uri = uri
        self._client = client(uri)
        self._owner = owner
        self._loggers = loggers
        self._said: list[str] = []
        if owner:
            self._client.set_tag(run_id, drivers.DRIVER, drivers.mark())
            self._client.update_run(run_id, status="RUNNING")  # it may go on after a failure
        self.pending: deque[Any] = deque()
        self._monitor = _started_monitor(run_id, uri, node) if system_metrics else None

    @classmethod
    def start(
        cls,
        experiment: str,
        run_name: str,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, object] | None = None,
        datasets: Sequence[DatasetRef] = (),
        system_metrics: bool = False,
    ) -> Tracker:
        """Open a run with flat `params`, `tags` and dataset lineage. The experiment is created on first use."""
        uri = tracking_uri()
        door, experiment_id = open_experiment(experiment)
        marks = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL", "git_commit": git_commit(), **(tags or {})}
        run = door.create_run(experiment_id, tags=texts(marks), run_name=run_name)
        tracker = cls(run.info.run_id, uri, owner=True, system_metrics=system_metrics)
        _log_params(door, tracker.run_id, params or {})
        tracker.datasets(datasets)
        tracker.text(json.dumps(whole_environment(), indent=1), "environment.json")
        return tracker

    @classmethod
    def resume(cls, run_id: str, uri: str | None = None, node: str = "", loggers: Sequence[Logger] = ()) -> Tracker:
        """Write into an open run. Pass `uri` in a worker: its working directory differs.

        node: system metrics of this machine are recorded as system/<node>/...; of its GPUs where nvidia-ml-py is installed.
        loggers: they are told what this tracker is told.
        """
        return cls(run_id, uri or tracking_uri(), owner=False, system_metrics=bool(node), loggers=loggers, node=node)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Queue one value a name for `step`; a failed write is raised by a later call or by `flush`."""
        now = int(time.time() * 1000)
        rows = [Metric(plain_name(name), float(value), now, step) for name, value in values.items()]
        self.pending.append(self._client.log_batch(self.run_id, metrics=rows, synchronous=False))
        while len(self.pending) > _MOST_PENDING:
            self.pending.popleft().wait()
        for logger in self._loggers:
            logger.metrics(values, step)

    def tags(self, values: Mapping[str, object]) -> None:
        self._client.log_batch(self.run_id, tags=[RunTag(name, text) for name, text in texts(values).items()])
        for logger in self._loggers:
            logger.tags(values)

    def datasets(self, refs: Sequence[DatasetRef]) -> None:
        """Record lineage: metadata only, nothing is read or copied."""
        inputs = [_input_of(ref) for ref in refs]
        if inputs:
            self._client.log_inputs(self.run_id, inputs)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copy a file, or a folder with its name, to the run's artifacts (below `folder`)."""
        self._client.log_artifact(self.run_id, str(path), folder)
        for logger in self._loggers:
            logger.artifact(str(path))

    def text(self, content: str, name: str) -> None:
        """Keep a text among the artifacts of the run, under `name`."""
        self._client.log_text(self.run_id, content, name)

    def say(self, line: str) -> None:
        """A line, with the time, for the log that is kept with the run when it ends."""
        self._said.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}")

    def flush(self) -> None:
        """Wait until every metric is stored. Raises MlflowException if one could not be."""
        while self.pending:
            self.pending.popleft().wait()

    def close(self) -> None:
        """Stop the system metrics and flush; the run stays open."""
        if self._monitor:
            self._monitor.finish()
            self._monitor = None
        for logger in self._loggers:
            logger.close()
        self.flush()

    def finish(self, status: str = "FINISHED") -> None:
        """Close and end the run: FINISHED, FAILED or KILLED."""
        self.say(status)
        try:
            self.close()
            note_waits(self)
            self.text("\n".join(self._said) + "\n", f"log/{time.strftime('%Y-%m-%dT%H-%M-%S')}.txt")  # one for each part of a run
        finally:
            self._client.set_terminated(self.run_id, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._said += traceback.format_exception(kind, error, trace)
            if not told_at_last(self):
                return
        if self._owner:
            self.finish("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED")
        else:
            self.close()


def end_run(run_id: str, uri: str, status: str) -> None:
    """End a run of another process, which can no longer do it: FINISHED, FAILED or KILLED."""
    client(uri).set_terminated(run_id, status)


def _started_monitor(run_id: str, uri: str, node: str) -> SystemMetricsMonitor:
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, node_id=node or None, tracking_uri=uri)
    monitor.start()
    return monitor


def _log_params(door: MlflowClient, run_id: str, params: Mapping[str, object]) -> None:
    rows = [Param(plain_name(name), shorten(str(value), LONGEST_PARAM)) for name, value in params.items()]
    for start in range(0, len(rows), _PARAMS_PER_CALL):
        door.log_batch(run_id, params=rows[start : start + _PARAMS_PER_CALL])


def _input_of(ref: DatasetRef) -> DatasetInput:
    source = json.dumps({"uri": ref.source})
    return DatasetInput(  # 36 and 500 characters are MLflow's limits
        Dataset(ref.name[:500], ref.digest[:36], urlparse(ref.source).scheme or "local", source),
        [InputTag("mlflow.data.context", ref.context)],
    )


def open_experiment(name: str) -> tuple[MlflowClient, str]:
    """A client of the store asked, and the id of the experiment, made if it is not there. Runs of dead drivers in it are ended."""
    uri = tracking_uri()
    door = client(uri)
    if (found := door.get_experiment_by_name(name)) is not None:
        drivers.close_dead(door, str(found.experiment_id))
        return door, str(found.experiment_id)
    location = None  # the server's choice
    if database := sqlite_path(uri):  # beside the database, whichever directory this process runs in
        location = folder_uri(database.parent / "mlruns" / re.sub(r"[^\w.-]|^\.+$", "_", name))
    try:
        return door, str(door.create_experiment(name, artifact_location=location))
    except MlflowException:
        if (found := door.get_experiment_by_name(name)) is None:
            raise
        return door, str(found.experiment_id)  # another process was first


class OtherStore(ValueError):
    """The store asked does not hold a run that was recorded in another."""


def run_of(folder: str) -> tuple[str, str | None] | None:
    """(id, address of the store it was recorded in) of the MLflow run of a training's folder, None without one."""
    said: dict[str, Any] = {}
    for name in ("started.json", "run.json"):  # version 0.1.0 told the store in the first only
        uri = files.join(folder, name)
        said |= json.loads(files.read_bytes(uri)) if files.exists(uri) else {}
    return (said["run_id"], said.get("tracking_uri")) if said.get("run_id") else None


def run_to_log(folder: str, quiet: bool = False) -> str | None:
    """Id of the MLflow run that figures about a training belong to; None without one. For the beginning of a stage and for its end.

    Where the store asked has no such run, None, and a line says why (unless quiet): the files of the stage are whole without it.
    Raises DeadTracking before any work.
    """
    if (found := run_of(folder)) is None:
        return None
    try:
        check_recorded(*found)
    except OtherStore as error:
        if not quiet:
            print(f"not logged to MLflow: {error}", file=sys.stderr)
        return None
    return found[0]


def check_recorded(run_id: str, recorded: str | None) -> None:
    """Raises OtherStore, naming both stores and the way out, when the store asked does not hold a run that `recorded` was asked to keep."""
    asked = tracking_uri()
    database = sqlite_path(asked)
    if not (database and not database.exists()):  # asking would make the file
        try:
            client(asked).get_run(run_id)
            return
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    if recorded and recorded != asked:
        place = shown(recorded)
        way = f"it was recorded in {place}: export MLFLOW_TRACKING_URI={shlex.quote(place)}, or start where that run was started"
    else:
        way = "it was recorded there, and deleted since; `itm train --overwrite` makes another" if recorded else "nothing says where it was"
    raise OtherStore(f"run {run_id} is not in the tracking store asked, {shown(asked)}; {way}")
