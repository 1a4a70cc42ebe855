"""The places that a stage reads and writes: which of its arguments and of its recipe's values are paths, and whose machine they are of."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itm.arguments import read_from, written_to
from itm.config import Recipe
from itm.data import files
from itm.kinds import IMPORT_PATH

PATH_KEYS = ("path", "folder", "file", "images", "captions", "root", "start", "model", "tokenizer", "vocab", "weights", "annotations")


@dataclass(frozen=True)
class Place:
    """A place as it was given. `key`: the argument, or the dotted key of the recipe, that names it."""

    key: str
    given: str
    written: bool = False

    @property
    def local(self) -> bool:
        """A path, not a URI of a store, nor a name in the registry or on a hub."""
        if files.is_remote(self.given) or self.given.startswith(("models:", "runs:")):
            return False
        return self.written or self.absolute or Path(self.given).exists()

    @property
    def absolute(self) -> bool:
        return self.given.startswith(("/", "~", "file:"))

    @property
    def path(self) -> Path:
        return Path(files.absolute(self.given))


def places_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[Place]:
    """Of the arguments that were declared with `read_from` or `written_to`."""
    for action in parser._actions:
        if action.type not in (read_from, written_to):
            continue
        value = getattr(args, action.dest, None)
        flag = action.option_strings[-1] if action.option_strings else action.dest
        for given in value if isinstance(value, list) else [value]:
            if given:
                yield Place(flag, str(given), action.type is written_to)


def places_in(recipe: Recipe) -> Iterator[Place]:
    """Of a recipe: roots and outputs, and every other text in it that is an absolute path or names something on this machine."""
    roots = {"data.root": recipe.data.root, "output": recipe.output, "teachers.root": recipe.teachers.root}
    roots |= {f"data.mix.{number}.root": one.root for number, one in enumerate(recipe.data.mix)}
    for key, root in roots.items():
        if root:
            yield Place(key, root, written=True)
    inner = recipe.model_dump(mode="json", exclude={"name", "about", "paper", "output", "allow", "registry"}, exclude_defaults=True)
    for key, text in _texts(inner):
        place = Place(key, text)
        plain = not ("/" in text or "." in text or key.rpartition(".")[2] in PATH_KEYS)  # a word, which a folder may be called by chance
        if key not in roots and not plain and "\n" not in text and not IMPORT_PATH.fullmatch(text) and place.local:
            yield place


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{number}")
