"""Experiment tracking and the model registry: the only door to MLflow.

    with Tracker.start("itm", "demo", recipe.flat(), datasets=[DatasetRef("train", manifest.fingerprint(), uri)]) as tracker:
        tracker.metrics({"loss": 0.7}, step=1)
    version = register_matcher("runs/demo/matcher", "itm-matcher", tracker.run_id, {"rsum": 312.0}, code=Path("itm/pyfunc.py"))
    promote("itm-matcher", version, "rsum", 312.0)
    folder = download("models:/itm-matcher@champion")

Only client objects with an explicit address are used, never MLflow's process-wide state, so that a Ray worker, a
notebook and a test in one process cannot write into each other's runs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlparse

import yaml

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # also keeps the schema migrations of a fresh SQLite file off the screen

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from itm.kinds import import_paths, origins
from itm.tracking.lineage import LONGEST_PARAM, DatasetRef, git_commit, packages_used, plain_name, shorten, texts, tracking_uri
from itm.tracking.loggers import Logger
from itm.tracking.package import save_package

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
LOWER_IS_BETTER = ("medr", "meanr", "loss")
_PARAMS_PER_CALL = 100  # MLflow's own limit
_MOST_PENDING = 512


def client(uri: str | None = None) -> MlflowClient:
    """A client of the tracking server and registry at `uri` (default `tracking_uri()`)."""
    uri = uri or tracking_uri()
    return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)


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
        if owner:
            self._client.update_run(run_id, status="RUNNING")  # it may go on after a failure
        self._pending: deque[Any] = deque()
        self._monitor = (
            SystemMetricsMonitor(run_id, resume_logging=True, node_id=node or None, tracking_uri=uri) if system_metrics else None
        )
        if self._monitor:
            self._monitor.start()

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
        door = client(uri)
        marks = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL", "git_commit": git_commit(), **(tags or {})}
        run = door.create_run(_experiment_id(door, uri, experiment), tags=texts(marks), run_name=run_name)
        tracker = cls(run.info.run_id, uri, owner=True, system_metrics=system_metrics)
        rows = [Param(plain_name(name), shorten(str(value), LONGEST_PARAM)) for name, value in (params or {}).items()]
        for start in range(0, len(rows), _PARAMS_PER_CALL):
            door.log_batch(tracker.run_id, params=rows[start : start + _PARAMS_PER_CALL])
        tracker.datasets(datasets)
        return tracker

    @classmethod
    def resume(cls, run_id: str, uri: str | None = None, node: str = "", loggers: Sequence[Logger] = ()) -> Tracker:
        """Write into an open run. Pass `uri` in a worker: its working directory differs.

        node: system metrics of this machine are recorded as well, as system/<node>/...; of its GPUs where nvidia-ml-py is installed.
        loggers: they are told what this tracker is told.
        """
        return cls(run_id, uri or tracking_uri(), owner=False, system_metrics=bool(node), loggers=loggers, node=node)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Queue one value a name for `step`; a failed write is raised by a later call or by `flush`."""
        now = int(time.time() * 1000)
        rows = [Metric(plain_name(name), float(value), now, step) for name, value in values.items()]
        self._pending.append(self._client.log_batch(self.run_id, metrics=rows, synchronous=False))
        while len(self._pending) > _MOST_PENDING:
            self._pending.popleft().wait()
        for logger in self._loggers:
            logger.metrics(values, step)

    def tags(self, values: Mapping[str, object]) -> None:
        self._client.log_batch(self.run_id, tags=[RunTag(name, text) for name, text in texts(values).items()])
        for logger in self._loggers:
            logger.tags(values)

    def datasets(self, refs: Sequence[DatasetRef]) -> None:
        """Record lineage: metadata only, nothing is read or copied."""
        inputs = [  # 36 and 500 characters are MLflow's limits
            DatasetInput(
                Dataset(r.name[:500], r.digest[:36], urlparse(r.source).scheme or "local", json.dumps({"uri": r.source})),
                [InputTag("mlflow.data.context", r.context)],
            )
            for r in refs
        ]
        if inputs:
            self._client.log_inputs(self.run_id, inputs)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copy a file, or a folder with its name, to the run's artifacts (below `folder`)."""
        self._client.log_artifact(self.run_id, str(path), folder)
        for logger in self._loggers:
            logger.artifact(str(path))

    def flush(self) -> None:
        """Wait until every metric is stored. Raises MlflowException if one could not be."""
        while self._pending:
            self._pending.popleft().wait()

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
        try:
            self.close()
        finally:
            self._client.set_terminated(self.run_id, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._owner:
            self.finish("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")
        else:
            self.close()


def _experiment_id(door: MlflowClient, uri: str, name: str) -> str:
    found = door.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None  # the server's choice
    if uri.startswith("sqlite:///"):  # beside the database, whichever directory this process runs in
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlruns" / re.sub(r"[^\w.-]", "_", name)).as_uri()
    try:
        return str(door.create_experiment(name, artifact_location=location))
    except MlflowException:
        if (found := door.get_experiment_by_name(name)) is None:
            raise
        return str(found.experiment_id)  # another process was first


@dataclass(frozen=True)
class Promotion:
    """Whether the champion alias points to the version now, and why. True in a condition if it does."""

    promoted: bool
    reason: str

    def __bool__(self) -> bool:
        return self.promoted


def register_matcher(
    folder: str | Path,
    name: str,
    run_id: str,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, object] | None = None,
    *,
    code: Path,
) -> str:
    """Log a matcher folder as a pyfunc model of the run and register it under `name`; returns the version.

    The package is `artifacts/matcher` (the folder as it is), `code` (the file of the pyfunc model) as text and explicit requirements: no
    pickle. A package of the user's own that the matcher names becomes a requirement at the version loaded here; one that pip could not
    find elsewhere travels as code. Metrics and tags become tags of the version, for searching and for the gate. The same weights of the
    same run are registered once: a second call only refreshes the tags. Raises ValueError if the folder holds no matcher.
    """
    folder = Path(folder)
    missing = [part for part in ("config.json", "model.safetensors") if not (folder / part).exists()]
    if missing:
        raise ValueError(
            f"{folder} is not a matcher folder: {', '.join(missing)} missing; train first, or point to the run that was trained"
        )
    config = json.loads((folder / "config.json").read_text())
    if unseen := {path for _, path in import_paths(config)} - set(origins(config)):
        raise ValueError(f"{folder} names {', '.join(sorted(unseen))}, not loaded here: itm.load_matcher(folder, allow=[...]) comes first")
    door = client()
    file_sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    marks = texts({"weights_sha256": file_sha256, "git_commit": git_commit(), **packages_used(config), **(tags or {}), **(metrics or {})})
    for version in _versions(door, name):
        if version.run_id == run_id and version.tags.get("weights_sha256") == file_sha256:
            for tag, text in marks.items():
                door.set_model_version_tag(name, str(version.version), tag, text)
            return str(version.version)
    model_id = _log_model(door, folder, name, run_id, metrics or {}, code)
    try:
        door.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = door.create_model_version(name, f"models:/{model_id}", run_id=run_id, tags=marks, model_id=model_id)
    return str(version.version)


def _log_model(door: MlflowClient, folder: Path, name: str, run_id: str, metrics: Mapping[str, float], code: Path) -> str:
    """Build the pyfunc package in a temporary folder, upload it as a LoggedModel and mark it ready last."""
    run = door.get_run(run_id)
    model = door.create_logged_model(run.info.experiment_id, name=name, source_run_id=run_id, model_type="retrieval")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            package = save_package(Path(scratch) / "model", folder, code, run_id, str(model.model_id))
            door.log_model_artifacts(model.model_id, str(package))
    except BaseException:
        door.finalize_logged_model(model.model_id, "FAILED")
        raise
    door.finalize_logged_model(model.model_id, "READY")
    for metric, value in metrics.items():
        door.log_metric(run_id, plain_name(metric), float(value), model_id=model.model_id)
    return str(model.model_id)


def promote(name: str, version: str, metric: str, value: float, min_gain: float = 0.0, comparable: str = "") -> Promotion:
    """The gate: `candidate` always moves to `version`; `champion` only if `metric` improved by more than `min_gain`.

    The old champion becomes `previous`. Names ending in medr, meanr or loss improve downwards. `comparable` names a tag
    (such as the fingerprint of the test split) that must be the same in both versions for the figures to compare.
    """
    door = client()
    version = str(version)
    door.set_registered_model_alias(name, CANDIDATE, version)
    if not math.isfinite(value):
        return Promotion(False, f"{metric} of version {version} is {value}; {CHAMPION} not moved")
    door.set_model_version_tag(name, version, metric, str(float(value)))
    aliases = _aliases(door, name)
    if CHAMPION not in aliases:
        door.set_registered_model_alias(name, CHAMPION, version)
        return Promotion(True, f"version {version} is the first {CHAMPION} ({metric} {value:.4g})")
    champion = aliases[CHAMPION]
    if champion == version:
        return Promotion(True, f"version {version} is {CHAMPION} already ({metric} {value:.4g})")
    theirs, ours = (door.get_model_version(name, v).tags for v in (champion, version))
    if comparable and theirs.get(comparable) != ours.get(comparable):
        differ = f"{comparable} is {theirs.get(comparable)} for {CHAMPION} version {champion}, {ours.get(comparable)} for version {version}"
        return Promotion(False, f"{differ}: their {metric} do not compare; register under another name, or move the alias by hand")
    if metric not in theirs:
        return Promotion(False, f"{CHAMPION} version {champion} has no {metric} to compare with; evaluate and register it again")
    gain = value - float(theirs[metric])
    if metric.endswith(LOWER_IS_BETTER):
        gain = -gain
    figures = f"{metric} {value:.4g} against {float(theirs[metric]):.4g} of version {champion}"
    if gain <= min_gain:
        return Promotion(False, f"{figures}: not better by more than {min_gain:g}, {CHAMPION} stays")
    door.set_registered_model_alias(name, PREVIOUS, champion)
    door.set_registered_model_alias(name, CHAMPION, version)
    return Promotion(True, f"{figures}: version {version} is {CHAMPION}, version {champion} is {PREVIOUS}")


def find_version(uri: str) -> Any:
    """The MLflow ModelVersion of `models:/name@alias` or `models:/name/version`; ValueError names what exists instead."""
    match = re.fullmatch(r"models:/([^@/]+)(?:@([^@/]+)|/(\d+))", uri)
    if not match:
        raise ValueError(f"{uri!r} is not of the form models:/name@alias or models:/name/3")
    name, alias, version = match.groups()
    door = client()
    try:
        aliases = _aliases(door, name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = sorted(model.name for model in door.search_registered_models())
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}; `itm register` adds one"
        raise ValueError(f"no model {name!r} in the registry at {tracking_uri()}; {hint}") from None
    if alias and alias not in aliases:
        has = ", ".join(f"{a} (version {v})" for a, v in sorted(aliases.items())) or "none"
        raise ValueError(f"model {name!r} has no alias {alias!r}; it has {has}; `itm register` sets them, or use models:/{name}/<version>")
    wanted = aliases[alias] if alias else version
    versions = {str(v.version): v for v in _versions(door, name)}
    if wanted not in versions:
        raise ValueError(f"model {name!r} has no version {wanted}; it has {', '.join(sorted(versions, key=int)) or 'none'}")
    return versions[wanted]


def download(uri: str) -> Path:
    """The local matcher folder of `models:/name@alias`, `models:/name/3`, `models:/m-<id>` or `runs:/<run id>[/<path>]`.

    Local registries are read in place; remote ones are fetched once into ITM_CACHE (default ~/.cache/itm).
    `runs:/<run id>` is the model the run logged last, `runs:/<run id>/<path>` a matcher folder among its artifacts.
    Raises ValueError naming the known models, aliases or versions.
    """
    if uri.startswith("runs:/"):
        return _run_folder(uri)
    if re.fullmatch(r"models:/m-[0-9a-f]+", uri):
        return _model_folder(uri.removeprefix("models:/"), uri)
    source = str(find_version(uri).source)
    if not source.startswith("models:/m-"):
        raise ValueError(f"{uri} was not registered by `itm register`: its source is {source}")
    return _model_folder(source.removeprefix("models:/"), uri)


def _model_folder(model_id: str, uri: str) -> Path:
    try:
        location = client().get_logged_model(model_id).artifact_location
    except MlflowException:
        raise ValueError(f"{uri}: no logged model {model_id} at {tracking_uri()}") from None
    package = _local(location, f"models:/{model_id}", model_id)
    artifacts = yaml.safe_load((package / "MLmodel").read_text())["flavors"]["python_function"].get("artifacts") or {}
    if "matcher" not in artifacts:
        raise ValueError(f"{uri} holds no matcher folder (it has {', '.join(artifacts) or 'no artifacts'}); `itm register` makes one")
    return package / artifacts["matcher"]["path"]


def _run_folder(uri: str) -> Path:
    run_id, _, path = uri.removeprefix("runs:/").partition("/")
    door = client()
    try:
        run = door.get_run(run_id)
    except MlflowException:
        raise ValueError(f"no run {run_id!r} at {tracking_uri()}; copy the id from the MLflow page of the run, or from run.json") from None
    if path:
        folder = _local(f"{run.info.artifact_uri}/{path}", uri, f"{run_id}-{path.replace('/', '-')}")
        if (folder / "config.json").exists():
            return folder
        raise ValueError(f"{uri} is not a matcher folder; the run holds {', '.join(item.path for item in door.list_artifacts(run_id))}")
    models = door.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'", max_results=1)
    if not models:
        raise ValueError(f"run {run_id!r} has logged no model yet; `itm register` does that")
    return _model_folder(models[0].model_id, uri)


def _local(location: str, uri: str, name: str) -> Path:
    """`location` itself where it is a local folder, else a copy of `uri` in the cache under `name`."""
    parsed = urlparse(location)
    if parsed.scheme in ("", "file"):
        return Path(unquote(parsed.path))
    cache = Path(os.environ.get("ITM_CACHE") or Path.home() / ".cache" / "itm") / "models"
    if not (cache / name).exists():
        from mlflow.artifacts import download_artifacts

        cache.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=cache, prefix=f".{name}-"))
        fetched = Path(download_artifacts(artifact_uri=uri, dst_path=str(fresh), tracking_uri=tracking_uri()))
        try:
            fetched.rename(cache / name)
        except OSError:
            if not (cache / name).exists():  # else another process was first
                raise
        shutil.rmtree(fresh, ignore_errors=True)
    return cache / name


def _versions(door: MlflowClient, name: str) -> list[Any]:
    return list(door.search_model_versions(f"name='{name}'"))


def _aliases(door: MlflowClient, name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in door.get_registered_model(name).aliases.items()}
