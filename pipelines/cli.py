"""`itm <stage> ...`: one command for every stage. Each stage also runs as `python -m pipelines.<stage>`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from itm.config import Recipe, load_recipe, overridden

STAGES = {
    "demo": "the whole pipeline on embedded defaults: scenes, teachers, three trainings, report",
    "pack": "raw data -> WebDataset tar shards with a manifest",
    "inspect": "say what a folder of shards holds: samples, captions, members, problems",
    "repair": "clean copy of shards: members grouped by key, unusable ones left out by name",
    "teach": "score shards with the teachers -> Arrow soft-label stores",
    "verify": "recompute random rows of a soft-label store and report the largest difference",
    "train": "train a matcher on shards (Ray Data -> Ray Train)",
    "evaluate": "recall and equivalence metrics of a matcher on a split, or of a score file",
    "register": "put a run's matcher into the model registry; promote it if the gate metric improved",
    "search": "text -> images or image -> captions with a registered matcher",
    "bench": "scoring speed against the published loops, and the time of a COCO 5K evaluation",
    "report": "one self-contained HTML page about a run",
    "import": "turn an authors' checkpoint into a matcher folder",
    "recipes": "list the shipped recipes",
    "submit": "run a stage on a Ray cluster as a job, follow its log, return its exit code",
}
MODULES = {"import": "import_checkpoint", "recipes": "list_recipes"}  # stages whose name cannot be a module here
RECIPES = Path(__file__).parent / "recipes"


def recipe_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The arguments of every stage that reads a recipe."""
    parser.add_argument("-c", "--recipe", required=required, help="recipe YAML: a path, or the name of a shipped one (see `itm recipes`)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, e.g. train.steps=50 model.options.width=64")
    parser.add_argument("--debug", action="store_true", help="the recipe's debug twin: tiny sizes, synthetic data, three steps")


def recipe_from(args: argparse.Namespace) -> Recipe:
    path = Path(args.recipe)
    shipped = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    path = path if path.exists() or not shipped.exists() else shipped
    if not args.debug:
        return load_recipe(path, args.overrides)
    from pipelines.debug import debug_twin

    return overridden(debug_twin(load_recipe(path)), args.overrides)


def stage_main(stage: str, argv: list[str] | None = None) -> int:
    """Parse, run, and turn an error the user can mend into one line and exit code 2."""
    module = import_module("pipelines." + MODULES.get(stage, stage))
    parser = argparse.ArgumentParser(prog=f"itm {stage}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(argv) if stage != "submit" else parser.parse_args(argv)
    try:
        return int(module.run(args) or 0)
    except (ValueError, OSError) as error:
        if os.environ.get("ITM_TRACEBACK"):
            raise
        print(f"itm {stage}: {error}", file=sys.stderr)
        return 2


def main(argv: list[str] | None = None) -> int:
    width = max(map(len, STAGES))
    stages = "\n".join(f"  {name:<{width}}  {about}" for name, about in STAGES.items())
    parser = argparse.ArgumentParser(
        prog="itm",
        description="Image-text matching, from raw files to a registered, searchable model.",
        epilog=f"stages:\n{stages}\n\n`itm <stage> --help` tells more. ITM_TRACEBACK=1 shows where an error arose.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES, metavar="stage", help="one of the stages below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    return stage_main(args.stage, args.rest)


if __name__ == "__main__":
    sys.exit(main())
