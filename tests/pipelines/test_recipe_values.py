"""The shipped recipes say what docs/methods/values.md says of them, and each paper's recipes are in that table."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import Any, NamedTuple

import pytest
import yaml

from itm.config import Recipe, load_recipe
from pipelines.cli import RECIPES
from tests.support.documents import DOCS

FAMILIES = ("scan-", "sgr-", "saf-", "sgraf-", "uarda-", "cusa-", "iais-")
PAPERS = {path.stem: load_recipe(path) for path in sorted(RECIPES.glob("*.yaml")) if path.stem.startswith(FAMILIES)}


class Value(NamedTuple):
    recipes: list[str]
    key: str
    published: str
    ours: str
    source: str
    why: str


def table() -> list[Value]:
    lines = [line for line in (DOCS / "methods" / "values.md").read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Value(re.findall(r"`([^`]+)`", row[0]), *(cell.strip("`") for cell in row[1:])) for row in rows]


def named(patterns: list[str]) -> list[Recipe]:
    return [recipe for name, recipe in PAPERS.items() if any(fnmatch(name, pattern) for pattern in patterns)]


def said(recipe: Recipe, key: str) -> Any:
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


def as_number(text: str) -> Any:
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row.recipes[0]}-{row.key}")
def test_every_recipe_of_a_row_has_its_value(row: Value):
    want = row.published if row.ours == "the same" else row.ours
    found = {recipe.name: said(recipe, row.key) for recipe in named(row.recipes)}
    assert found, f"no recipe is called {row.recipes}"
    assert found == dict.fromkeys(found, as_number(want))


def test_a_value_that_differs_from_its_source_says_why():
    assert {bool(row.why) == (row.ours != "the same") for row in table()} == {True}
    assert all(row.source for row in table())


@pytest.mark.parametrize("name", [name for name, recipe in PAPERS.items() if not recipe.evaluation.ensemble])
def test_every_choice_of_the_optimisation_that_is_no_default_has_its_source(name: str):
    known = {row.key for row in table() if PAPERS[name] in named(row.recipes)}
    chosen = {f"train.{key}" for key in PAPERS[name].model_dump(mode="json", exclude_defaults=True)["train"]}
    places = {f"train.{key}" for key in ("start", "use_gpu", "workers", "log_shares")}
    inherited = {"train.step_epochs"} if PAPERS[name].train.schedule != "step" else set()
    assert chosen <= known | places | inherited
