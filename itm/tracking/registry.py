"""The model registry.

version = register_matcher("runs/demo/matcher", "itm-matcher", tracker.run_id, {"rsum": 312.0}, code=Path("itm/pyfunc.py"))
promote("itm-matcher", version, "rsum", 312.0)
find_version("models:/itm-matcher@champion").version
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from itm.kinds import import_paths, origins
from itm.tracking.addresses import tracking_uri
from itm.tracking.card import LONGEST_DESCRIPTION, Card
from itm.tracking.lineage import git_commit, packages_used, plain_name, shorten, texts
from itm.tracking.package import save_package
from itm.tracking.runs import DESCRIPTION, RECIPE, client

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
METRICS, CHANCE = "metrics", "chance"  # tags of a version, as JSON
LINEAGE = {"weights_sha256", "git_commit", "packages", "recipe", "recipe_name", "train_data", "test_data", "teachers", METRICS, CHANCE}
LOWER_IS_BETTER = ("medr", "meanr", "loss")


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
    card: Card | None = None,
) -> str:
    """Log a matcher folder as a pyfunc model of the run and register it under `name`; returns the version.

    The package is `artifacts/matcher` (the folder as it is), `code` (the file of the pyfunc model) as text and explicit requirements: no
    pickle. A package of the user's own that the matcher names becomes a requirement at the version loaded here; one that pip could not
    find elsewhere travels as code. Metrics and tags become tags of the version, for searching and for the gate; the card becomes its
    description and the README of the package, with the recipe beside it, and its figures of other protocols a tag each, metrics/<heading>.
    The same weights of the same run are registered once: a second call only refreshes tags and description. Raises ValueError if the
    folder holds no matcher.
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
    others = {plain_name(f"{METRICS}/{group}"): json.dumps(dict(found)) for group, found in (card.others if card else {}).items()}
    about = {"weights_sha256": file_sha256, "git_commit": git_commit(), **packages_used(config)}
    marks = texts({**about, **others, **(tags or {}), **(metrics or {})})
    for version in _versions(door, name):
        if version.run_id == run_id and version.tags.get("weights_sha256") == file_sha256:
            for tag, text in marks.items():
                door.set_model_version_tag(name, str(version.version), tag, text)
            _describe(door, name, str(version.version), run_id, card, marks)
            return str(version.version)
    model_id = _log_model(door, folder, name, run_id, code, card, marks)
    for metric, value in (metrics or {}).items():
        door.log_metric(run_id, plain_name(f"{card.group}/{metric}" if card else metric), float(value), model_id=model_id)
    for group, found in card.others.items() if card else ():
        for metric, value in found.items():
            door.log_metric(run_id, plain_name(f"{group}/{metric}"), float(value), model_id=model_id)
    try:
        door.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with _asking(tracking_uri()):
        version = door.create_model_version(name, f"models:/{model_id}", run_id=run_id, tags=marks, model_id=model_id)
    _describe(door, name, str(version.version), run_id, card, marks)
    return str(version.version)


def _describe(door: MlflowClient, name: str, version: str, run_id: str, card: Card | None, marks: Mapping[str, str]) -> None:
    """The card as the description of the version and of its run."""
    if card:
        text = card.markdown(figures(marks), figures(marks, CHANCE))
        door.update_model_version(name, version, shorten(text, LONGEST_DESCRIPTION))
        door.set_tag(run_id, DESCRIPTION, text)


def figures(tags: Mapping[str, str], which: str = METRICS) -> dict[str, float]:
    """The metrics of a version, or what chance gives. Version 0.1.0 had a tag for each metric, and none for chance."""
    with contextlib.suppress(ValueError):
        if which in tags:
            return {name: float(value) for name, value in json.loads(tags[which]).items()}
    found: dict[str, float] = {}
    if which == METRICS:
        for name, text in tags.items():
            with contextlib.suppress(ValueError):
                found |= {} if name in LINEAGE else {name: float(text)}
    return found


@contextlib.contextmanager
def _asking(uri: str) -> Iterator[None]:
    """MLflow looks a model of a `models:/` source up in the store that the process asks by default, not in that of its client."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _log_model(door: MlflowClient, folder: Path, name: str, run_id: str, code: Path, card: Card | None, marks: Mapping[str, str]) -> str:
    """Build the pyfunc package in a temporary folder, upload it as a LoggedModel and mark it ready last."""
    run = door.get_run(run_id)
    model = door.create_logged_model(run.info.experiment_id, name=name, source_run_id=run_id, model_type="retrieval")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            package = save_package(Path(scratch) / "model", folder, code, run_id, str(model.model_id))
            if card:
                (package / "README.md").write_text(card.readme(figures(marks), figures(marks, CHANCE)))
                (package / RECIPE).write_text(card.recipe)
            door.log_model_artifacts(model.model_id, str(package))
    except BaseException:
        door.finalize_logged_model(model.model_id, "FAILED")
        raise
    door.finalize_logged_model(model.model_id, "READY")
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


def crown(name: str, version: str) -> str:
    """Move `champion` to a version by hand, past the gate; the one before becomes `previous`. Says what was done."""
    door, before = client(), _aliases(client(), name).get(CHAMPION)
    if before == version:
        return f"version {version} of {name} is {CHAMPION} already"
    if before:
        door.set_registered_model_alias(name, PREVIOUS, before)
    door.set_registered_model_alias(name, CHAMPION, version)
    return f"version {version} of {name} is {CHAMPION}" + (f", version {before} is {PREVIOUS}" if before else "")


def rollback(name: str) -> str:
    """`champion` goes back to `previous`, and the two change places, so a second call undoes the first. Raises ValueError without one."""
    return crown(name, str(find_version(f"models:/{name}@{PREVIOUS}").version))


def find_version(uri: str) -> Any:
    """The MLflow ModelVersion of `models:/name@alias` or `models:/name/version`; ValueError names what exists instead."""
    match = re.fullmatch(r"models:/([^@/]+)(?:@([^@/]+)|/(\d+))", uri)
    if not match:
        raise ValueError(f"{uri!r} is not of the form models:/name@alias or models:/name/3")
    name, alias, version = match.groups()
    aliases = aliases_of(name)
    if alias and alias not in aliases:
        has = ", ".join(f"{a} (version {v})" for a, v in sorted(aliases.items())) or "none"
        raise ValueError(f"model {name!r} has no alias {alias!r}; it has {has}; `itm register` sets them, or use models:/{name}/<version>")
    wanted = aliases[alias] if alias else version
    versions = {str(v.version): v for v in _versions(client(), name)}
    if wanted not in versions:
        raise ValueError(f"model {name!r} has no version {wanted}; it has {', '.join(sorted(versions, key=int)) or 'none'}")
    return versions[wanted]


def aliases_of(name: str) -> dict[str, str]:
    """Alias -> version of a registered model. Raises ValueError for one that is not there, naming the near one."""
    door = client()
    try:
        return _aliases(door, name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = sorted(model.name for model in door.search_registered_models())
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}; `itm register` adds one"
        raise ValueError(f"no model {name!r} in the registry at {tracking_uri()}; {hint}") from None


def _versions(door: MlflowClient, name: str) -> list[Any]:
    return list(door.search_model_versions(f"name='{name}'"))


def _aliases(door: MlflowClient, name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in door.get_registered_model(name).aliases.items()}
