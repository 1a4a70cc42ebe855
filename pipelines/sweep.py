"""Train variants of a recipe side by side on Ray Tune, stop the hopeless ones early, and write the recipe of the best.

    itm sweep -c demo --space 'train.lr=log(1e-4,1e-2)' 'model.options.width=choice(64,128)' --trials 8
    itm sweep -c mine.yaml train.epochs=5 --space 'method.options.tau=uniform(0.02,0.1)' --trials 20 --at-once 4
    itm train -c runs/demo/sweep/best.yaml

Spaces: log(low,high), uniform(low,high), int(low,high), choice(a,b,...). Trials are compared by registry.metric in their validations, at a
ninth and a third of their steps, where the best third goes on (asynchronous successive halving; --whole trains all of them to the end).
Each trial is a training in one process below <output>/<name>/sweep, a child of the sweep's MLflow run. A sweep that is interrupted goes on:
finished and stopped trials stay, the others from their checkpoints.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.cli import recipe_arguments, recipe_from, script

if TYPE_CHECKING:
    from itm.data.formats import Json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--space", nargs="+", action="extend", default=[], metavar="KEY=SPACE", help="what varies")
    parser.add_argument("--trials", type=int, default=8, help="how many variants; a larger number later goes on (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of what the trials draw (default 0)")
    parser.add_argument("--at-once", type=int, metavar="N", help="most trials at a time (default: one a CPU or GPU of the cluster)")
    parser.add_argument("--whole", action="store_true", help="stop no trial early")
    parser.add_argument("--overwrite", action="store_true", help="forget an earlier sweep in the same folder")


def run(args: argparse.Namespace) -> None:
    from pipelines.sweeping.driver import sweep
    from pipelines.sweeping.trials import Asked

    if args.trials < 1 or (args.at_once is not None and args.at_once < 1):
        raise ValueError("--trials and --at-once take 1 or more")
    asked = Asked(args.space, args.trials, args.seed, args.at_once, args.whole)
    for line in table(sweep(recipe_from(args), asked, args.overwrite)):
        print(line)


def table(said: Json) -> list[str]:
    """The trials, the best first, and what to do with it."""
    rows = sorted(said["trials"], key=lambda row: (row["value"] is None, -(row["value"] or 0.0)))
    lines = [f"trial  {'state':<8}  {said['metric']:>10}  {'step':>7}  choices"]
    for row in rows:
        value = "-" if row["value"] is None else f"{row['value']:.4g}"
        choices = ", ".join(f"{key}={value}" for key, value in row["choices"].items())
        lines.append(f"{row['number']:05d}  {row['state']:<8}  {value:>10}  {row['step'] or '-':>7}  {choices}")
    return [*lines, f"best: trial {said['best']:03d}; its recipe: itm train -c {said['recipe']}"]


def kept(args: argparse.Namespace) -> str:
    """What a sweep that is stopped leaves behind."""
    from itm.data import files
    from pipelines.sweeping.trials import sweep_folder

    folder = sweep_folder(recipe_from(args))
    trials = files.list_folders(folder) if files.exists(folder) else []
    done = [uri for uri in trials if files.exists(files.join(uri, "run.json")) or files.exists(files.join(uri, "stopped.json"))]
    return f"{len(done)} trials are done in {folder}"


if __name__ == "__main__":
    script(__file__)
