"""Train a matcher on packed shards: Ray Data streams the planned pairs, Ray Train steps, MLflow records.

    itm train -c demo.yaml                                        # one worker
    itm train -c demo.yaml train.workers=2 train.steps=200        # two, same order of pairs
    itm train -c demo.yaml train.workers=0                        # inside this process, without Ray

Writes below <output>/<name>: matcher/ (the best weights by validation rSum), losses.jsonl, checkpoints/, quarantine-<rank>.jsonl (if any
pair could not be used) and, last, run.json. A finished run is not run again; one that was interrupted goes on from its newest checkpoint,
also with another number of workers. --overwrite starts afresh. data.val_split="''" (empty) trains without validation and keeps the last
weights.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.cli import recipe_arguments, recipe_from, script

if TYPE_CHECKING:
    from itm.config import Recipe
    from itm.data.formats import Json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="forget an earlier run in the same folder")


def run(args: argparse.Namespace) -> None:
    from pipelines.training import driver
    from pipelines.training.startup import StartUp

    done = driver.train(recipe_from(args), args.overwrite, StartUp.of_this_process())
    best = done["best"]
    print(f"{done['steps']} steps in {done['seconds']:.0f} s ({done['samples_per_s']:.0f} pairs/s), MLflow run {done['run_id']}")
    if (share := done.get("same_image_share")) is not None:
        print(f"batches: {share:.2%} of the pairs had another pair of their image beside them")
    print(
        f"best validation rSum {best['metrics']['rsum']:.1f} at step {best['step']}" if best else "no validation split: last weights kept"
    )
    if done.get("ended"):
        print(f"ended before its last step: {done['ended']}")
    print(f"matcher: {done['matcher']}")
    print(driver.flow_line(done))


def kept(args: argparse.Namespace) -> str:
    """What a training that is stopped leaves behind."""
    from itm.data import files

    recipe = recipe_from(args)
    names = (files.name_of(uri).removesuffix(".json") for uri in files.list_files(files.join(recipe.folder, "checkpoints"), ".json"))
    steps = [int(name) for name in names if name.isdigit()]
    return f"the checkpoint of step {max(steps):,} is kept in {recipe.folder}" if steps else "there is no checkpoint yet"


def train(recipe: Recipe, overwrite: bool = False) -> Json:
    """Run, resume or recognise a run; returns what run.json holds. Raises ValueError, before any work, for what cannot run."""
    from pipelines.training import driver

    return driver.train(recipe, overwrite)


if __name__ == "__main__":
    script(__file__)
