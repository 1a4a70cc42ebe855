"""Every shipped recipe of a paper runs as it stands on the authors' layouts, members before their ensembles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from itm.config import load_recipe
from pipelines.cli import RECIPES
from tests.support.as_published import run, working_folder

FAMILIES = ("scan-", "sgr-", "saf-", "sgraf-", "uarda-", "cusa-", "iais-")
PAPERS = {path.stem: load_recipe(path) for path in sorted(RECIPES.glob("*.yaml")) if path.stem.startswith(FAMILIES)}
ORDER = sorted(PAPERS, key=lambda name: bool(PAPERS[name].evaluation.ensemble))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with working_folder(tmp_path_factory.mktemp("authors")) as made:
        yield made


@pytest.mark.parametrize("name", ORDER)
def test_a_recipe_runs_as_shipped_on_the_authors_layout(name: str, folder: Path) -> None:
    recipe, result, registered = run(name)
    assert math.isfinite(result["metrics"]["rsum"])
    assert (result["protocol_name"], result["split"]) == (recipe.evaluation.protocol, recipe.data.test_split)
    assert registered.name == name
