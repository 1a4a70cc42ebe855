"""`itm <stage> ...`: one command for every stage. Each stage also runs as `python -m pipelines.<stage>`.

Nothing is imported here, or at the top of a stage's file, that takes long to import: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import itm
from itm.data.patience import ASKED, first_contact
from itm.extras import needed_by
from itm.progress import json_lines
from pipelines.stopping import STOPPED, failed, sigterm_as_interrupt, stopped, traced

if TYPE_CHECKING:
    from itm.config import Recipe

GROUPS = ("look", "prepare", "teach", "train", "judge", "use", "cluster")


@dataclass(frozen=True)
class Stage:
    """A command: under which heading of `itm --help` it stands, what it does, and its module where that has another name."""

    group: str
    about: str
    module: str = ""


STAGES = {
    "init": Stage("look", "look at your photos and captions and write a first recipe for them"),
    "demo": Stage("look", "the whole pipeline on embedded defaults: scenes, teachers, three trainings, report"),
    "recipes": Stage("look", "list the shipped recipes, or print one with the origin of each value", "list_recipes"),
    "plan": Stage("look", "what `itm run` will do with a recipe: inputs, outputs, what is done, steps, time, memory, bytes"),
    "run": Stage("look", "all stages of a recipe in order, nothing twice: pack, features, teach, train, evaluate, register, report"),
    "inspect": Stage("look", "say what a folder of shards, or of soft-label stores, holds"),
    "pack": Stage("prepare", "raw data -> WebDataset tar shards with a manifest"),
    "features": Stage("prepare", "photos in shards -> region shards, by any image encoder or in a detector's boxes"),
    "repair": Stage("prepare", "clean copy of shards: members grouped by key, unusable ones left out by name"),
    "import": Stage("prepare", "turn an authors' checkpoint into a matcher folder", "import_checkpoint"),
    "teach": Stage("teach", "score shards with the teachers -> Arrow soft-label stores"),
    "verify": Stage("teach", "recompute random rows of a soft-label store and report the largest difference"),
    "train": Stage("train", "train a matcher on shards (Ray Data -> Ray Train)"),
    "sweep": Stage("train", "train variants of a recipe side by side, stop the hopeless ones, write the recipe of the best"),
    "evaluate": Stage("judge", "recall and equivalence metrics of a matcher on a split, or of a score file"),
    "report": Stage("judge", "one self-contained HTML page about a run"),
    "explain": Stage("judge", "why a matcher scores one pair as it does: words, relations, gates, edges, on one page"),
    "bench": Stage("judge", "scoring speed against the published loops, and the time of a COCO 5K evaluation"),
    "register": Stage("use", "put a run's matcher into the model registry; promote it if the gate metric improved"),
    "models": Stage("use", "registered models: versions, figures, origin; show, diff, promote, rollback"),
    "index": Stage("use", "shards or photos -> vectors of a matcher that are searched"),
    "search": Stage("use", "text -> images or image -> captions with a registered matcher"),
    "serve": Stage("use", "serve a matcher over HTTP with a page to search by; a moved alias is taken up without a gap"),
    "export": Stage("use", "soft-label stores for other trainers, matchers for transformers or ONNX"),
    "submit": Stage("cluster", "run a stage on a Ray cluster as a job, follow its log, return its exit code"),
}
TRACKED = ("pack", "teach", "train", "sweep", "evaluate", "register", "models", "run", "demo")  # stages that record a run, or read records
RECIPES = Path(__file__).parent / "recipes"


def module_of(stage: str) -> str:
    """The full name of the module behind a stage."""
    return f"pipelines.{STAGES[stage].module or stage}"


def recipe_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The arguments of every stage that reads a recipe."""
    parser.add_argument("-c", "--recipe", required=required, help="recipe YAML: a path, or the name of a shipped one (see `itm recipes`)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, e.g. train.steps=50 model.options.width=64")
    allow_argument(parser)
    parser.add_argument("--debug", action="store_true", help="the recipe's debug twin: tiny sizes, synthetic data, three steps")
    parser.add_argument("--dry-run", action="store_true", help="say what would be read, written and done, and what it costs; do nothing")


def allow_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package whose code may run because a matcher folder or a registered model names a part of it (may be repeated)",
    )


def recipe_path(given: str) -> Path:
    """The file of a recipe: the path that was given, or the shipped recipe of that name."""
    if given.startswith(("~", "file:")):
        from itm.data.files import absolute

        given = absolute(given)
    path = Path(given)
    shipped = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    return path if path.exists() or not shipped.exists() else shipped


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The recipe that the arguments of `recipe_arguments` name."""
    from itm.config import load_recipe, overridden

    path = recipe_path(args.recipe)
    if args.debug:
        from pipelines.debug import debug_twin

        recipe = overridden(debug_twin(load_recipe(path)), args.overrides)
    else:
        recipe = load_recipe(path, args.overrides)
    return recipe.model_copy(update={"allow": [*recipe.allow, *args.allow]})


def stage_main(stage: str, argv: list[str] | None = None) -> int:
    """Parse and run a stage; what stops it, or is wrong, becomes a line or a few on stderr and an exit code (`pipelines.stopping`)."""
    # Before torch is imported: else its CPU threads spin between two operations, and where another process wants the same cores each small
    # operation (a batch of texts has thousands) waits until a spinning thread is taken off its core: 2 to 70 times the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = sys.argv[1:] if argv is None else argv
    module, args, asked = None, None, (ASKED.again, ASKED.waited)
    with sigterm_as_interrupt(), ExitStack() as stack:
        try:
            module = import_module(module_of(stage))
            _, args = parsed(stage, module, argv)
            if stage != "submit" and (args.log or os.environ.get("ITM_LOG")) == "json":  # what submit prints is lines of the job
                stack.enter_context(json_lines(stage))
            check_submitted(stage)
            with needed_by(f"itm {stage}", extra="pipeline"), first_contact(args.wait_for):
                if getattr(args, "dry_run", False) and getattr(args, "recipe", None):
                    only = {"plan": None, "run": None, "sweep": "train"}.get(stage, stage)  # a sweep is trainings
                    import_module(module_of("plan")).show(recipe_from(args), only=only)
                    return 0
                return int(module.run(args) or 0)
        except KeyboardInterrupt:
            if traced():
                raise
            print(f"\n{stopped(stage, module, args, argv)}" if sys.stderr.isatty() else stopped(stage, module, args, argv), file=sys.stderr)
            return STOPPED
        except Exception as error:  # whatever it is, the user gets it in a few lines
            if traced():
                raise
            said, code = failed(stage, error)
            print(said, file=sys.stderr)
            return code
        finally:
            if said := ASKED.since(asked):
                print(said, file=sys.stderr)


def check_submitted(stage: str) -> None:
    """In a job of `itm submit`: raises ValueError when the machine that submitted it has files that it reads, and this one has not, and
    when nobody has told where runs are recorded."""
    if not (submitter := os.environ.get("ITM_SUBMITTED_FROM")):
        return
    if stage in TRACKED:
        from itm.tracking.addresses import tracking_uri

        tracking_uri()
    missing = [path for path in json.loads(os.environ.get("ITM_READ_THERE", "[]")) if not os.path.exists(path)]
    if missing:
        raise ValueError(
            f"{missing[0]} lies on {submitter}, which submitted this job, and not on {socket.gethostname()}, where it runs: upload it "
            f"(aws s3 cp --recursive {missing[0]} s3://BUCKET/...) and give its URI, or submit with --ship where it is small"
        )


def parsed(stage: str, module: ModuleType, argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser of a stage, and what it makes of the arguments. An argument that it does not know ends the process, as argparse does."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a part of the user's own may lie; last, so that nothing is hidden by it
    parser = argparse.ArgumentParser(prog=f"itm {stage}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show errors as Python does, with the way there (as ITM_TRACEBACK=1 does)")
    parser.add_argument(
        "--wait-for",
        type=float,
        metavar="SECONDS",
        help="how long a store or tracking server that does not answer at the beginning is waited for (default: it is refused at once)",
    )
    parser.add_argument(
        "--log", choices=("text", "json"), help="json: what is printed is JSON lines of time, stage, step, loss, ... (as ITM_LOG=json does)"
    )
    args = parser.parse_intermixed_args(argv) if stage != "submit" else parser.parse_args(argv)
    if args.traceback:
        os.environ["ITM_TRACEBACK"] = "1"  # also for the processes that a stage starts
    return parser, args


def script(file: str) -> NoReturn:
    """What `python -m pipelines.<stage>` does: the stage whose module lies in `file`."""
    module = f"pipelines.{Path(file).stem}"
    sys.exit(stage_main(next(stage for stage in STAGES if module_of(stage) == module)))


def overview() -> str:
    """The stages, grouped by what a person does, one line each."""
    width = max(map(len, STAGES))
    lines = []
    for group in GROUPS:
        lines.append(f"{group}:")
        lines += [f"  {name:<{width}}  {stage.about}" for name, stage in STAGES.items() if stage.group == group]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="itm",
        usage="itm [-h] [--version] stage ...",
        description="Image-text matching, from raw files to a registered, searchable model.",
        epilog=f"{overview()}\n\n`itm <stage> --help` tells more. --traceback shows where an error arose.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"itm {itm.__version__}")
    parser.add_argument("stage", metavar="stage", help="one of the stages below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage not in STAGES:
        near = difflib.get_close_matches(args.stage, STAGES, n=1)
        parser.error(f"unknown stage {args.stage!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(STAGES)}"))
    return stage_main(args.stage, args.rest)


if __name__ == "__main__":
    sys.exit(main())
