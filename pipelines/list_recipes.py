"""List the shipped recipes: what each trains, and the published figures it stands for.

itm recipes                # one line a recipe
itm recipes --markdown     # the table of docs/recipes.md
"""

from __future__ import annotations

import argparse

from itm.config import Recipe, load_recipe
from pipelines.cli import RECIPES

COLUMNS = ("paper", "recipe", "published figures (R@1 R@5 R@10)", "verified here")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")


def shipped() -> dict[str, Recipe]:
    """Name -> recipe, sorted; every shipped file is valid."""
    return {path.stem: load_recipe(path) for path in sorted(RECIPES.glob("*.yaml"))}


def row_of(name: str, recipe: Recipe) -> tuple[str, ...]:
    return str(recipe.paper["source"]), f"`{name}`", str(recipe.paper["published"]), str(recipe.paper["verified"])


def markdown() -> str:
    published = sorted(row_of(name, recipe) for name, recipe in shipped().items() if recipe.paper)
    rows = [COLUMNS, ("---",) * len(COLUMNS), *published]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def run(args: argparse.Namespace) -> int:
    if args.markdown:
        print(markdown())
        return 0
    recipes = shipped()
    width = max(map(len, recipes))
    for name, recipe in recipes.items():
        print(f"{name:<{width}}  {recipe.about}")
    return 0


if __name__ == "__main__":
    import sys

    from pipelines.cli import stage_main

    sys.exit(stage_main("recipes"))
