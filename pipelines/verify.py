"""Recompute random rows of a soft-label store with the live teacher and report how far they are from what is stored.

    itm verify -c demo.yaml --rows 256 --seed 1

Prints, for each teacher of the recipe, max |dS| (the largest difference of a cosine between two of the rows: this is what a
method sees) and max |dv| (of a component of the unit vectors). Exit code 1 when max |dS| is above what the stored type allows.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from itm.device import HELP
from pipelines.cli import recipe_arguments, recipe_from, script

if TYPE_CHECKING:
    from itm.config import Recipe
    from pipelines.teaching.recompute import Verified


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--split", help="which split's stores (default: data.train_split)")
    parser.add_argument("--rows", type=int, default=128, help="rows to recompute per store (default: 128)")
    kind = HELP.partition(" (default")[0]
    parser.add_argument("--device", help=f"{kind} (default: the kind that wrote the store, where it is there)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of rows (default: 0)")


def run(args: argparse.Namespace) -> int:
    results = verify(recipe_from(args), args.split, args.rows, args.seed, args.device)
    for result in results:
        print(result)
    return int(any(not result.ok for result in results))


def verify(recipe: Recipe, split: str | None = None, rows: int = 128, seed: int = 0, device: str | None = None) -> list[Verified]:
    """Recompute `rows` random rows of each store of the recipe on `device`; unset: the kind of device that wrote them, where it is there.

    Raises ValueError when a store is missing, belongs to other shards, its teacher has other weights now, or the device is not there.
    """
    from pipelines.teaching import recompute

    return recompute.verify(recipe, split, rows, seed, device)


if __name__ == "__main__":
    script(__file__)
