"""The spaces of a sweep: which keys of a recipe vary, from where their values are drawn, and what a trial draws.

    train.lr=log(1e-5,1e-3)   model.options.width=choice(64,128)   method.options.tau=uniform(0.01,0.1)   train.batch_size=int(32,256)

What a trial draws is a function of the seed and its number, so that a sweep that goes on draws what it drew before.
"""

from __future__ import annotations

import difflib
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from itm.choices import merge
from itm.config import NO_CHOICES, Recipe, parse_recipe

DIGITS = 4  # of a drawn number: what a person can write down
TRIES = 100  # draws for a trial that is not like an earlier one
SPACE = re.compile(r"\s*([^=\s]+)\s*=\s*([A-Za-z]+)\s*\((.*)\)\s*", re.DOTALL)
FORM = "key=log(low,high), key=uniform(low,high), key=int(low,high) or key=choice(a,b,...)"


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _log(chance: random.Random, low: float, high: float) -> float:
    return _rounded(math.exp(chance.uniform(math.log(low), math.log(high))))


def _uniform(chance: random.Random, low: float, high: float) -> float:
    return _rounded(chance.uniform(low, high))


DISTRIBUTIONS: dict[str, Callable[..., Any]] = {
    "log": _log,
    "uniform": _uniform,
    "int": lambda chance, low, high: chance.randint(low, high),
    "choice": lambda chance, *values: chance.choice(values),
}


@dataclass(frozen=True)
class Space:
    """Where the values of one key come from. distribution: a name of `DISTRIBUTIONS`, arguments: its ends, or the values to choose of."""

    key: str
    distribution: str
    arguments: tuple[Any, ...]

    def draw(self, chance: random.Random) -> Any:
        return DISTRIBUTIONS[self.distribution](chance, *self.arguments)

    def __str__(self) -> str:
        return f"{self.distribution}({','.join(map(str, self.arguments))})"


def parse_spaces(texts: Iterable[str], recipe: Recipe) -> tuple[Space, ...]:
    """Of the words behind --space, as a recipe takes them. Raises ValueError, one sentence that names the key, for a bad one."""
    spaces = [parse_space(text) for text in texts]
    if not spaces:
        raise ValueError(f"a sweep needs a space: --space {FORM}")
    seen: set[str] = set()
    for space in spaces:
        if space.key in seen:
            raise ValueError(f"--space {space.key} is given twice: one space a key")
        seen.add(space.key)
        check_key(space.key)
        for end in space.arguments:
            try:
                with_choices(recipe, {space.key: end})
            except ValueError as error:
                raise ValueError(f"--space {space.key}: {str(error).removeprefix('recipe: ')}") from None
    return tuple(spaces)


def parse_space(text: str) -> Space:
    """Raises ValueError for another form, an unknown distribution, or ends that it cannot lie between."""
    parsed = SPACE.fullmatch(text)
    if not parsed:
        raise ValueError(f"--space {text!r} is not of the form {FORM}")
    key, name, inside = parsed.groups()
    if name not in DISTRIBUTIONS:
        near = difflib.get_close_matches(name, DISTRIBUTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DISTRIBUTIONS)}"
        raise ValueError(f"--space {key}: unknown distribution {name!r}; {hint}")
    try:
        values = tuple(map(_number, yaml.safe_load(f"[{inside}]")))
    except yaml.YAMLError:
        raise ValueError(f"--space {key}: {name}({inside}) is no list of values") from None
    if name == "choice":
        if not values:
            raise ValueError(f"--space {key}: choice() has nothing to choose of")
        return Space(key, name, values)
    wanted = int if name == "int" else (int, float)
    numbers = all(isinstance(value, wanted) and not isinstance(value, bool) for value in values)
    if len(values) != 2 or not numbers or not values[0] < values[1] or (name == "log" and values[0] <= 0):
        kind = {"log": "numbers above 0", "int": "whole numbers"}.get(name, "numbers")
        raise ValueError(f"--space {key}: {name}({inside}) has to be two {kind}, the smaller one first")
    return Space(key, name, values)


def _number(value: Any) -> Any:
    """YAML reads 1e-5 as a text."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def check_key(key: str) -> None:
    """Raises ValueError for a key by which trials would not differ in what they learn, or not be found."""
    section, _, name = key.partition(".")
    free = NO_CHOICES.get(section, ())
    if free is True or name in free or section in ("name", "registry") or key == "data.root":
        raise ValueError(f"--space {key}: trials may not differ in it, since it says where or how a run is made and not what it learns")


def draw(spaces: Iterable[Space], seed: int, count: int) -> list[dict[str, Any]]:
    """The choices of `count` trials, no two alike; fewer where the spaces hold no more."""
    spaces, drawn = list(spaces), list[dict[str, Any]]()
    for number in range(count):
        chance = random.Random(f"{seed}/{number}")
        found = ({space.key: space.draw(chance) for space in spaces} for _ in range(TRIES))
        if (new := next((choices for choices in found if choices not in drawn), None)) is None:
            break
        drawn.append(new)
    return drawn


def with_choices(recipe: Recipe, choices: dict[str, Any]) -> Recipe:
    """The recipe with values of dotted keys. Raises ValueError as `load_recipe`."""
    said = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in choices.items():
        nested: Any = value
        for name in reversed(key.split(".")):
            nested = {name: nested}
        said = merge(said, nested)
    return parse_recipe(said)
