"""Score shards with frozen teachers: one soft-label store per teacher, one Arrow sidecar per shard.

    itm teach -c demo.yaml
    itm teach -c coco.yaml --split val teachers.text.kind=minilm
    itm teach -c coco.yaml --shuffled 7

teachers.image and teachers.text name the teachers. --shuffled makes their control, whose vectors belong to other images, and says how to
train with it; it is the same as `{kind: shuffled, options: {of: {kind: ...}, seed: 7}}` in the recipe. Stores lie below
<data.root>/<split>/teachers (or <teachers.root>/<split>). Shards that have a valid sidecar are kept, so it can be stopped at any time and
run again: the store ends with the same bytes. Rows that could not be scored keep their place, are listed in quarantine.jsonl, and fail the
stage past data.max_reject_rate. A page with the nearest neighbours of 20 samples is written for a new or grown store.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.cli import recipe_arguments, recipe_from, script

if TYPE_CHECKING:
    from itm.config import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--split", help="which split to score (default: data.train_split)")
    about = "make the shuffled control of the recipe's teachers, by a permutation of this seed (default: 0)"
    parser.add_argument("--shuffled", nargs="?", const=0, type=int, metavar="SEED", help=about)


def run(args: argparse.Namespace) -> None:
    from itm.data import files
    from itm.teachers.shuffled import control_of
    from pipelines.teaching import driver, inspection

    recipe = recipe_from(args)
    if args.shuffled is not None:
        recipe = control_of(recipe, args.shuffled)
    split_uri = files.absolute(files.join(recipe.data.root, args.split or recipe.data.train_split))
    for modality, uri in teach(recipe, args.split).items():
        print(f"{modality}: {uri}")
        print(driver.flow_line(uri))
        try:
            print(f"nearest neighbours of 20 samples, to judge by: {inspection.page_of(uri, split_uri)}")
        except ValueError as error:  # the store is whole all the same
            print(f"no page of nearest neighbours: {error}")
        if args.shuffled is not None:
            print(f"train with it: 'teachers.{modality}={getattr(recipe.teachers, modality).model_dump_json()}'")


def kept(args: argparse.Namespace) -> str:
    """What a scoring that is stopped leaves behind."""
    from itm.data import files
    from itm.teachers.stores import stores_root

    recipe = recipe_from(args)
    root = stores_root(recipe, args.split or recipe.data.train_split)
    whole = sum(len(files.list_files(store, ".arrow")) for store in files.list_folders(root))
    return f"{whole:,} scored shards are kept in {root}"


def teach(recipe: Recipe, split: str | None = None) -> dict[str, str]:
    """Make (or complete) the stores that a recipe asks for; returns modality -> store URI.

    Raises ValueError when no teacher is named, nothing can be written, a teacher gives unusable vectors, or too many rows are rejected.
    """
    from pipelines.teaching import driver

    return driver.teach(recipe, split)


if __name__ == "__main__":
    script(__file__)
