"""Questions to the model registry: which versions there are, what they can do, and what they came from."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from mlflow.exceptions import MlflowException

from itm.tracking.addresses import tracking_uri
from itm.tracking.drivers import DRIVER, ENDED, close_dead
from itm.tracking.registry import CHAMPION, CHANCE, METRICS, aliases_of, figures, find_version
from itm.tracking.runs import RECIPE, client

_PAGE = 200
_NEWEST_RUNS = 25


@dataclass(frozen=True)
class Version:
    """A version of a registered model. created: local time; metrics and chance: of its test."""

    name: str
    version: str
    aliases: tuple[str, ...]
    created: str
    run_id: str
    tags: Mapping[str, str] = field(repr=False)

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def metrics(self) -> dict[str, float]:
        return figures(self.tags)

    @property
    def chance(self) -> dict[str, float]:
        return figures(self.tags, CHANCE)

    @property
    def others(self) -> dict[str, dict[str, float]]:
        """Heading, e.g. test/eccv -> figures of the same weights by another protocol or on another split."""
        found: dict[str, dict[str, float]] = {}
        for name, text in self.tags.items():
            with contextlib.suppress(ValueError):  # a text that was too long for a tag
                found |= {name.removeprefix(f"{METRICS}/"): json.loads(text)} if name.startswith(f"{METRICS}/") else {}
        return found

    @property
    def data(self) -> dict[str, str]:
        return {name: self.tags.get(f"{name}_data", "") for name in ("train", "test")}

    @property
    def teachers(self) -> list[str]:
        return [name.strip() for name in self.tags.get("teachers", "").split(",") if name.strip()]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "uri": self.uri,
            "name": self.name,
            "version": int(self.version),
            "aliases": list(self.aliases),
            "created": self.created,
            "recipe": self.tags.get("recipe_name", ""),
            "recipe_fingerprint": self.tags.get("recipe", ""),
            "metrics": self.metrics,
            "chance": self.chance,
            "others": self.others,
            "data": self.data,
            "teachers": self.teachers,
            "code": self.tags.get("git_commit", ""),
            "licence": self.tags.get("licence", ""),
            "weights_sha256": self.tags.get("weights_sha256", ""),
            "run_id": self.run_id,
        }


def versions(name: str | None = None) -> list[Version]:
    """Of one model or of all, by name, the newest first. Raises ValueError for a model that is not there, naming the near one."""
    if name is not None:
        aliases_of(name)
    door = client()
    models = [model for model in _all(door.search_registered_models) if name in (None, model.name)]
    found = []
    for model in sorted(models, key=lambda model: model.name):
        aliases = {str(alias): str(version) for alias, version in model.aliases.items()}
        rows = _all(door.search_model_versions, f"name='{model.name}'")
        found += [_version(row, aliases) for row in sorted(rows, key=lambda row: -int(row.version))]
    return found


def _all(search: Any, *arguments: Any) -> list[Any]:
    page = search(*arguments, max_results=_PAGE)
    rows = list(page)
    while page.token:
        page = search(*arguments, max_results=_PAGE, page_token=page.token)
        rows += page
    return rows


def _version(row: Any, aliases: Mapping[str, str]) -> Version:
    created = datetime.datetime.fromtimestamp(row.creation_timestamp / 1000).strftime("%Y-%m-%d %H:%M")
    mine = tuple(sorted(alias for alias, version in aliases.items() if version == str(row.version)))
    return Version(row.name, str(row.version), mine, created, row.run_id or "", dict(row.tags))


def version_of(given: str) -> Version:
    """The version that `name@alias`, `name/3`, either after `models:/`, or a bare name (champion, else newest) means."""
    given = given.removeprefix("models:/")
    if "@" not in given and "/" not in given:
        known = versions(given)
        if not known:
            raise ValueError(f"model {given!r} has no version at {tracking_uri()}")
        return next((version for version in known if CHAMPION in version.aliases), known[0])
    row = find_version(f"models:/{given}")
    return next(version for version in versions(row.name) if version.version == str(row.version))


def recipe_of(version: Version) -> dict[str, Any]:
    """The recipe that the version was trained with, as its run kept it; of a run of version 0.1.0 as its params say it. {} = not kept."""
    from mlflow.artifacts import load_text  # slow

    if not version.run_id:
        return {}
    try:
        run = client().get_run(version.run_id)
    except MlflowException:
        return {}
    with contextlib.suppress(MlflowException, OSError):
        found: Any = yaml.safe_load(load_text(f"{run.info.artifact_uri}/{RECIPE}"))
        return dict(found)
    nested: dict[str, Any] = {}
    for key, text in run.data.params.items():
        section = nested
        *path, last = key.split(".")
        for name in path:
            section = section.setdefault(name, {})
        section[last] = _value(text)
    return nested


def _value(text: str) -> Any:
    """Params are the `str` of a value."""
    try:
        return {"None": None, "True": True, "False": False}[text]
    except KeyError:
        with contextlib.suppress(ValueError):
            return json.loads(text.replace("'", '"'))
        return text


def difference(first: Version, second: Version) -> dict[str, Any]:
    """What differs: recipe (dotted key -> both values), data and teachers, and every metric with both values and its chance."""
    ours, theirs = _flat(recipe_of(first)), _flat(recipe_of(second))
    about = [
        version.data | {"teachers": ", ".join(version.teachers), "code": version.tags.get("git_commit", "")} for version in (first, second)
    ]
    chance = first.chance | second.chance
    return {
        "versions": [first.uri, second.uri],
        "recipe": {
            key: [ours.get(key), theirs.get(key)] for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)
        },
        "data": {name: [about[0][name], about[1][name]] for name in about[0] if about[0][name] != about[1][name]},
        "comparable": first.data["test"] == second.data["test"],
        "metrics": {
            name: [first.metrics.get(name), second.metrics.get(name), chance.get(name)]
            for name in dict.fromkeys([*first.metrics, *second.metrics])
        },
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: inner for name, part in value.items() for key, inner in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()}


def runs(experiment: str) -> list[dict[str, Any]]:
    """The newest runs of an experiment. Those that a driver of this machine left behind when it was killed are ended, and shown as dead."""
    door = client()
    if (found := door.get_experiment_by_name(experiment)) is None:
        known = sorted(other.name for other in _all(door.search_experiments))
        raise ValueError(f"no experiment {experiment!r} at {tracking_uri()}; there are: {', '.join(known)}")
    close_dead(door, str(found.experiment_id))
    rows: Any = door.search_runs([found.experiment_id], max_results=_NEWEST_RUNS)
    return [_run(row) for row in rows]


def _run(row: Any) -> dict[str, Any]:
    tags, end = row.data.tags, row.info.end_time
    unknown = " (driver unknown)" if row.info.status == "RUNNING" and DRIVER not in tags else ""
    return {
        "run_id": row.info.run_id,
        "name": row.info.run_name,
        "stage": tags.get("stage", ""),
        "status": "DEAD" if row.info.status == "KILLED" and tags.get(DRIVER, "-") in tags.get(ENDED, "") else row.info.status + unknown,
        "started": datetime.datetime.fromtimestamp(row.info.start_time / 1000).strftime("%Y-%m-%d %H:%M"),
        "seconds": round((end - row.info.start_time) / 1000, 1) if end else None,
    }
