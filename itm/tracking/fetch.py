"""Matcher folders by their address in the registry: read in place where it is local, else fetched once."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote

import yaml
from mlflow.exceptions import MlflowException

from itm.tracking.addresses import local_path, tracking_uri
from itm.tracking.registry import find_version
from itm.tracking.runs import client


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
    models = [m for m in door.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'") if str(m.status) == "READY"]
    if not path and not models:
        raise ValueError(f"run {run_id!r} has logged no model yet; `itm register` does that")
    for model in models:  # the newest comes first
        if path in ("", model.name):
            return _model_folder(model.model_id, uri)
    if any(item.path == path for item in door.list_artifacts(run_id, path.rpartition("/")[0] or None)):
        folder = _local(f"{run.info.artifact_uri}/{quote(path)}", uri, f"{run_id}-{path.replace('/', '-')}")
        if (folder / "config.json").exists():
            return folder
    holds = sorted({item.path for item in door.list_artifacts(run_id)} | {model.name for model in models})
    raise ValueError(f"{uri} is not a matcher folder; the run holds {', '.join(holds) or 'nothing'}")


def _local(location: str, uri: str, name: str) -> Path:
    """`location` itself where it is a local folder, else a copy of `uri` in the cache under `name`."""
    if (place := local_path(location)) is not None:
        return place
    cache = Path(os.environ.get("ITM_CACHE") or Path.home() / ".cache" / "itm") / "models"
    if not (cache / name).exists():
        from mlflow.artifacts import download_artifacts  # slow

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
