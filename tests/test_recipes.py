"""Every shipped recipe is valid, and its debug twin packs, teaches, trains and evaluates with real stages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from itm.config import load_recipe
from pipelines.cli import RECIPES
from pipelines.debug import debug_twin
from pipelines.list_recipes import markdown

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PARTS: Any = {"data": {"image"}, "teachers": True, "model": True, "method": True}


def distinct_twins() -> list[str]:
    """Recipes of one method on two data sets shrink to the same twin: it runs once."""
    twins = {name: debug_twin(load_recipe(RECIPES / f"{name}.yaml")) for name in NAMES}
    return sorted({json.dumps(twin.model_dump(mode="json", include=PARTS)): name for name, twin in twins.items()}.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_named_as_its_file_and_says_what_it_is(name: str):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.name == name
    assert recipe.about
    assert name.startswith("demo") or {"source", "published", "verified", "decisions"} <= set(recipe.paper)


def test_the_table_of_the_readme_is_made_from_the_recipes():
    assert markdown() in (RECIPES.parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.mark.e2e
@pytest.mark.parametrize("name", distinct_twins())
def test_the_debug_twin_of_every_recipe_runs(name: str, place: Path, monkeypatch: pytest.MonkeyPatch, ray_local):
    from pipelines import evaluate, pack, teach, train

    monkeypatch.chdir(place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    recipe = debug_twin(load_recipe(RECIPES / f"{name}.yaml", [f"output={place}"]))
    pack.pack(recipe)
    if recipe.teachers.image:
        teach.teach(recipe)
    done = train.train(recipe)
    assert done["steps"] == 3
    result = evaluate.evaluate(recipe)
    assert math.isfinite(result["metrics"]["rsum"])
