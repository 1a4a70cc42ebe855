"""What goes with a job to the cluster: the code, the recipe, a user's own packages, and small files where that is asked for.

The whole of it is put together in a folder of its own, so that nothing of the working folder travels by accident: no data, no virtual
environment, no keys.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import itm
import pipelines
from itm.config import Recipe, resolve_recipe
from itm.data import files
from pipelines.places import Place

MOST = 20 << 20
"""Bytes of files that may go with a job. More belongs into a store that all nodes read."""
RECIPES_SENT = "recipes"
FILES_SENT = "sent"
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


@dataclass
class Parcel:
    """A folder that becomes the working folder of the job, and the arguments of its stage, which name places inside it."""

    folder: Path
    arguments: list[str]
    names: list[str] = field(default_factory=list)

    def add_code(self) -> None:
        """The two packages of this project, wherever they are installed."""
        for package in (itm, pipelines):
            self.add_package(Path(str(package.__file__)).parent)

    def add_package(self, place: Path) -> None:
        """A package (a folder) or a single module, importable in the job."""
        if place.is_dir():
            shutil.copytree(place, self.folder / place.name, ignore=LEFT_OUT)
        else:
            shutil.copy(place, self.folder / place.name)
        self.names.append(place.name)

    def add_recipe(self, args: argparse.Namespace, path: Path) -> None:
        """A recipe of the user's own as one file, with what it extends inside it."""
        choices = resolve_recipe(path).written
        inside = f"{RECIPES_SENT}/{path.name}"
        (self.folder / RECIPES_SENT).mkdir(exist_ok=True)
        (self.folder / inside).write_text(yaml.safe_dump(choices, sort_keys=False, allow_unicode=True))
        self.rename(args.recipe, inside)
        self.names.append(path.name)

    def rename(self, given: str, new: str) -> None:
        """Another name for a value among the arguments."""
        self.arguments = [_with_value(word, given, new) for word in self.arguments]

    def ship(self, place: Place, recipes: Iterable[Recipe]) -> None:
        """Send what lies at a place and have the job read it from there."""
        inside = self.add_file(place.path)
        if place.absolute:  # the nodes may have the same path: say which of the two is read
            self.names[-1] = f"a copy of {place.path}"
        if place.key.startswith("-") or any(word == place.given for word in self.arguments):
            self.rename(place.given, inside)
            return
        for recipe in recipes:
            self.arguments += overriding(recipe.model_dump(mode="json"), place.key, inside)

    def add_file(self, path: Path) -> str:
        """A file or folder; returns its place in the working folder of the job. Raises ValueError when it is too much."""
        number = len(list((self.folder / FILES_SENT).glob("*"))) if (self.folder / FILES_SENT).exists() else 0
        inside = f"{FILES_SENT}/{number}/{path.name}"
        if (size := size_of(path)) > MOST:
            raise ValueError(f"{path} holds {size / 1e6:,.0f} MB, --ship sends up to {MOST / 1e6:.0f}: {upload_line(path)}")
        target = self.folder / inside
        target.parent.mkdir(parents=True)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copy(path, target)
        self.names.append(path.name)
        return inside

    def said(self) -> str:
        """How much goes, and what."""
        held = files.walk(self.folder)
        return f"sends {len(held):,} files, {sum(held.values()) / 1e6:.1f} MB: {', '.join(self.names) or 'nothing'}"


def size_of(path: Path) -> int:
    """Bytes of a file or folder."""
    return path.stat().st_size if path.is_file() else sum(files.walk(path).values())


def upload_line(path: Path) -> str:
    """The command that brings a file or folder where all nodes can read it."""
    whole = path.resolve()
    recursive = "--recursive " if whole.is_dir() else ""
    return f"aws s3 cp {recursive}{whole} s3://BUCKET/{whole.name}, and give that URI"


def own_packages(names: Iterable[str]) -> list[Path]:
    """Folders (or files) of the packages that no package index could give the cluster: those that do not lie among the installed ones."""
    found = []
    for name in sorted(set(names)):
        spec = importlib.util.find_spec(name)
        places = [*(spec.submodule_search_locations or []), spec.origin] if spec else []
        place = Path(str(places[0])) if places else None
        if place is not None and not {"site-packages", "dist-packages"} & set(place.parts) and name not in ("itm", "pipelines"):
            found.append(place)
    return found


def overriding(choices: Any, key: str, value: str) -> list[str]:
    """The override that puts `value` at a dotted key; of an element of a list the whole list is given, as overrides know no elements."""
    names = key.split(".")
    for depth, name in enumerate(names):
        if name.isdigit():
            whole = json.loads(json.dumps(choices))
            held: Any = whole
            for inner in names[depth:-1]:
                held = held[int(inner) if inner.isdigit() else inner]
            held[int(names[-1]) if names[-1].isdigit() else names[-1]] = value
            return [f"{'.'.join(names[:depth])}={json.dumps(whole)}"]
        choices = choices[name]
    return [f"{key}={value}"]


def _with_value(word: str, value: str, new: str) -> str:
    """An argument in whatever form it was given: `value`, `--recipe=value` or `-cvalue`."""
    for head in ("", "-c"):
        if word == head + value:
            return head + new
    flag, equals, rest = word.partition("=")
    return f"{flag}={new}" if equals and flag.startswith("--") and rest == value else word
