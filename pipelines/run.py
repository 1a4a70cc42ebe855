"""All stages of a recipe in order, nothing twice: pack -> features -> teach (where it asks for them) -> train -> evaluate -> register ->
report.

    itm run -c recipe.yaml                    # what is done already is named and left alone
    itm run -c recipe.yaml train.steps=2000   # with overrides, as every stage takes them

It stops at the first stage that fails, says why, and goes on there when it is called again. `itm plan` says beforehand what it will do.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from pipelines.cli import recipe_arguments, recipe_from, script

if TYPE_CHECKING:
    from itm.config import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)


def run(args: argparse.Namespace) -> None:
    recipe = recipe_from(args)
    worked = run_stages(recipe, again=" ".join(["itm run -c", args.recipe, *args.overrides]))
    if not worked:
        print("nothing to do: every stage is done")
    print(next_step(recipe))


def run_stages(recipe: Recipe, again: str = "itm run") -> list[str]:
    """Do what is not done yet; returns the names of the stages that worked.

    again: the command that goes on. Raises ValueError naming the stage that failed, its reason, and what is kept.
    """
    from pipelines.contract import stages_of

    worked: list[str] = []
    finished: list[str] = []
    for contract in stages_of(recipe):
        stage = contract.stage
        try:
            said = contract.done(recipe)
            if said is not None:
                print(f"{stage:<9} done already: {said}", flush=True)
            else:
                print(f"{stage:<9} ...", flush=True)
                start = time.perf_counter()
                said = contract.work(recipe)
                worked.append(stage)
                print(f"{stage:<9} {time.perf_counter() - start:.0f} s: {said}", flush=True)
        except (ValueError, OSError) as error:
            kept = f"{', '.join(finished)} {'is' if len(finished) == 1 else 'are'} done and kept; " if finished else ""
            raise ValueError(f"{stage} failed: {error}\n{kept}mend that and call `{again}` again: it goes on at {stage}") from error
        finished.append(stage)
    return worked


def next_step(recipe: Recipe) -> str:
    """What to try with the finished run."""
    import shlex

    from itm.data import files

    shards = files.join(recipe.data.root, recipe.data.test_split)
    model = files.join(recipe.folder, "matcher")
    return f'try: itm search "what you look for" --model {shlex.quote(model)} --shards {shlex.quote(shards)}'


if __name__ == "__main__":
    script(__file__)
