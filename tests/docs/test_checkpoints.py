"""The page on released checkpoints quotes the recipes' figures, and names every file of Unicom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from itm.config import load_recipe
from itm.teachers.unicom import RELEASED
from pipelines.cli import RECIPES

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
ROWS = re.findall(r"^\| [^|]+ \| `([\w-]+)` \| ([^|]+) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("recipe", "expected"), ROWS, ids=[recipe for recipe, _ in ROWS])
def test_a_figure_to_expect_is_the_recipes_own(recipe: str, expected: str) -> None:
    published = load_recipe(RECIPES / f"{recipe}.yaml").paper["published"]
    figures = re.findall(r"\d+\.\d+", expected)
    assert figures and not set(figures) - set(re.findall(r"\d+\.\d+", published))


def test_every_family_and_every_file_of_unicom_has_its_place() -> None:
    assert len(ROWS) == 19
    assert all(f"`FP16-{name}.pt`" in PAGE for name in RELEASED.values())
    assert re.findall(r"^## (.+)$", PAGE, re.MULTILINE) == [
        "SCAN",
        "SGRAF",
        "NAAF and UARDA",
        "UNITER and IAIS",
        "CLIP",
        "CUSA",
        "The teachers",
    ]
