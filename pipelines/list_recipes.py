"""List the shipped recipes, or print one as it is resolved: every value, and where it comes from.

itm recipes                               # one line a recipe
itm recipes sgr-coco train.epochs=10      # the whole recipe after `extends`, defaults and overrides; valid YAML
itm recipes my.yaml --debug               # its debug twin
itm recipes --markdown                    # the table of docs/recipes.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.cli import RECIPES, recipe_path, script

if TYPE_CHECKING:
    from itm.config import Recipe, Resolved

COLUMNS = ("paper", "recipe", "published figures (R@1 R@5 R@10)", "verified here")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="print this recipe: a shipped one, or a path")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as of the stages")
    parser.add_argument("--debug", action="store_true", help="the recipe's debug twin")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")


def run(args: argparse.Namespace) -> int:
    if args.name:
        print(resolved(args.name, args.overrides, args.debug))
        return 0
    if args.debug:
        raise ValueError("--debug needs the name of a recipe: itm recipes NAME --debug")
    if args.markdown:
        print(markdown())
        return 0
    recipes = shipped()
    width = max(map(len, recipes))
    for name, recipe in recipes.items():
        print(f"{name:<{width}}  {recipe.about}")
    return 0


def resolved(name: str, overrides: list[str], debug: bool = False) -> str:
    """The whole recipe as YAML, each value with a comment that says where it comes from. Raises ValueError as `load_recipe`."""
    from itm.config import OVERRIDE, Resolved, overridden, resolve_recipe

    path = recipe_path(name)
    found = resolve_recipe(path, [] if debug else overrides)
    files = " extends ".join(layer.origin for layer in reversed(found.layers) if layer.origin != OVERRIDE)
    lines = [f"# {files}"]
    if debug:
        from pipelines.debug import debug_twin

        lines.append(f"# the debug twin of {found.recipe.name}: what it changes or leaves is told by `itm recipes {name}`")
        found = Resolved(overridden(debug_twin(found.recipe), overrides), ())
    return "\n".join([*lines, *_commented(found, debug)])


def _commented(found: Resolved, debug: bool) -> Iterator[str]:
    rows = list(_rows(found.recipe.model_dump(mode="json"), (), found))
    width = min(60, max(len(text) for text, origin in rows if origin))
    for text, origin in rows:
        yield text if debug or not origin else f"{text:<{width}}  # {origin}"


def _rows(section: dict[str, object], key: tuple[str, ...], found: Resolved) -> Iterator[tuple[str, str]]:
    """(YAML line, origin) of every value of a section; a sub-section's own line has none."""
    import yaml

    for name, value in section.items():
        indent, inner = "  " * len(key), (*key, str(name))
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:", ""
            yield from _rows(value, inner, found)
        else:
            text = yaml.safe_dump({name: value}, default_flow_style=True, width=1 << 20, allow_unicode=True).strip()[1:-1]
            yield indent + text, found.origin(inner, value)


def shipped() -> dict[str, Recipe]:
    """Name -> recipe, sorted; every shipped file is valid."""
    from itm.config import load_recipe

    return {path.stem: load_recipe(path) for path in sorted(RECIPES.glob("*.yaml"))}


def row_of(name: str, recipe: Recipe) -> tuple[str, ...]:
    return str(recipe.paper["source"]), f"`{name}`", str(recipe.paper["published"]), str(recipe.paper["verified"])


def markdown() -> str:
    published = sorted(row_of(name, recipe) for name, recipe in shipped().items() if recipe.paper)
    rows = [COLUMNS, ("---",) * len(COLUMNS), *published]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


if __name__ == "__main__":
    script(__file__)
