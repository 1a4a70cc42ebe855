"""Look at raw data, say what is there, and write a first recipe that works as it is.

    itm init photos                                 # photos with captions.csv, .txt beside each, metadata.jsonl, ... or no captions
    itm init photos captions.csv -o mine.yaml       # the captions lie elsewhere
    itm init annotations/captions_train2017.json --image-root train2017
    itm init photos --model openai/clip-vit-base-patch32        # fine-tune a CLIP
    itm init photos --model real                    # heads on pretrained towers of the extra `real`, without a hub
    itm init data/f30k_precomp                      # data as the authors of a paper laid them out: that paper's recipe

Read are folders of photos, tables (csv, tsv, |), COCO, Karpathy and pair lists, imagefolders, parquet and saved data sets, zips and tars,
WebDataset shards (ours, img2dataset's), *_precomp folders, UNITER databases and bottom-up TSV files. Where two readings are possible it
asks; where nobody can be asked it stops and names the flag that answers. Nothing is packed or trained: `itm run` does that.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli import script

if TYPE_CHECKING:
    from itm.config import Part
    from itm.data.detect.finding import Finding, Question
    from pipelines.published import Published
    from pipelines.survey import Survey

REAL, SCRATCH = "real", "scratch"  # of --model
FLAGS = {
    "annotations": "the file of captions where there are several; `beside` = .txt files beside the images, `none` = no captions",
    "image-root": "the folder from which the paths of the captions lead to images",
    "image-column": "table: the column of image paths",
    "caption-columns": "table: the column of captions, several with commas between",
    "delimiter": "table: tab, |, `,` or ;",
    "header": "table: whether the first line names the columns, yes or no",
    "as": "tar: shards or photos",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="path", help="a folder, file or URI; and the file of captions where it lies elsewhere")
    parser.add_argument("-o", "--output", default="recipe.yaml", help="recipe to write (default recipe.yaml)")
    parser.add_argument("--overwrite", action="store_true", help="replace a recipe that is there")
    parser.add_argument("--name", help="name of the run (default: that of the data)")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="fine-tune this CLIP or SigLIP (hub name or folder) instead of training from scratch; `real`: heads on the frozen towers of "
        "the extra `real`, where no hub can be reached; `scratch`: a small model, also of data that a published recipe reads",
    )
    for flag, about in FLAGS.items():
        parser.add_argument(f"--{flag}", help=about, metavar="VALUE")


def run(args: argparse.Namespace) -> None:
    if os.path.exists(args.output) and not args.overwrite:
        raise ValueError(f"{args.output} is there already; give another name with -o, or --overwrite to replace it")
    answers = {flag: value for flag in FLAGS if (value := getattr(args, flag.replace("-", "_"))) is not None}
    for line in init(args.paths, args.output, answers, name=args.name, model=args.model, ask=_ask if sys.stdin.isatty() else None):
        print(line)


def _ask(question: Question) -> str:
    """Ask a person. An empty answer is asked again."""
    print(f"{question.asked}:")
    for value, meaning in question.answers.items():
        print(f"  {value}   {meaning}")
    while not (answer := input(f"{question.flag}? ").strip()):
        pass
    return answer


def init(
    paths: list[str],
    output: str,
    answers: dict[str, str],
    *,
    name: str | None = None,
    model: str | None = None,
    ask: Callable[[Question], str] | None = None,
) -> list[str]:
    """Write the recipe `output`; returns what is to be said about the data and what comes next.

    ask: gives the answer to a question; without it a question is raised. Raises ValueError where nothing readable is there.
    """
    import yaml

    from itm.config import parse_recipe
    from itm.data import files
    from itm.packaged import have_real
    from pipelines.first_recipe import FirstRecipe, Machine, index_only
    from pipelines.published import published
    from pipelines.survey import survey

    finding = _found(paths, answers, ask)
    finding = replace(finding, source=_from_here(finding.source))
    seen = survey(finding)
    if not seen.images:
        raise ValueError("\n".join([f"{finding.layout}: nothing of it can be used", *seen.lines()]))
    finding, seen = _split(finding, seen)
    if model is None and (paper := published(finding, bool(Machine.here().gpu))):
        files.write_atomic(output, paper.text.encode())
        return [*_told(finding, seen, paper.notes), *_said_of(paper, output)]
    model = None if model == SCRATCH else model
    real = model == REAL
    if real and not have_real():
        raise ValueError("--model real is of pretrained towers in packages: pip install 'itm-pipeline[real]'")
    recipe = FirstRecipe(name or _name(paths[0]), finding, seen, Machine.here(), None if real else model, real)
    text = recipe.text() if recipe.captioned else index_only(recipe)
    parse_recipe(yaml.safe_load(text), output)
    files.write_atomic(output, text.encode())
    said = _told(finding, seen)
    if model is None and have_real() and recipe.captioned and finding.image == "pixels":
        said.append("better    --model real: heads on the pretrained towers of the extra `real`, which need no hub and no download")
    return [*said, f"wrote     {output}: {recipe.about()}", f"next      {recipe.next_command(output)}"]


def _told(finding: Finding, seen: Survey, notes: Sequence[str] = ()) -> list[str]:
    return [f"found     {finding.layout}", *(f"note      {note}" for note in (*finding.notes, *notes)), *seen.lines()]


def _said_of(paper: Published, output: str) -> list[str]:
    return [
        f"published these data are laid out as their authors published them: {paper.recipe}; also {', '.join(paper.also)}",
        f"wrote     {output}: the shipped recipe {paper.recipe}; `--model {SCRATCH}` writes one of a small model instead",
        f"next      itm run -c {output}",
    ]


def _found(paths: list[str], answers: dict[str, str], ask: Callable[[Question], str] | None) -> Finding:
    from itm.data.detect.finding import Question
    from itm.data.detect.look import look

    while True:
        try:
            return look(paths, answers)
        except Question as question:
            if ask is None:
                raise
            answers = {**answers, question.flag: ask(question)}


def _split(finding: Finding, seen: Survey) -> tuple[Finding, Survey]:
    """Where all images are of one split, a share of them is held out: whole images, always the same ones."""
    from pipelines.first_recipe import splits_for
    from pipelines.survey import survey

    if finding.source is None or set(seen.totals) != {"train"} or not finding.captioned:
        return replace(finding, splits=finding.splits or {"train": next(iter(seen.totals))}), seen
    shares = splits_for(sum(seen.totals.values()))
    if shares is None:
        return replace(finding, splits={"train": "train"}), seen
    source = finding.source.model_copy(update={"options": finding.source.options | {"split": shares}})
    parted = replace(finding, source=source, splits={"train": "train"} | {role: role for role in shares})
    try:
        again = survey(parted)
    except ValueError:  # a share that gets no image
        return replace(finding, splits={"train": "train"}), seen
    note = f"held out for {' and '.join(shares)}: {', '.join(f'{again.totals[role]} images' for role in shares)}, chosen by their content"
    return replace(parted, notes=(*finding.notes, note)), again


def _from_here(part: Part | None) -> Part | None:
    """Paths below the working folder as relative ones: the recipe moves with the project."""
    if part is None:
        return None
    return part.model_copy(update={"options": {key: _short(value) for key, value in part.options.items()}})


def _short(value: object) -> object:
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    here = os.getcwd() + os.sep
    return value.removeprefix(here) if isinstance(value, str) and value.startswith(here) else value


def _name(path: str) -> str:
    """A name for the run from the data's: letters, digits, dashes."""
    stem = re.sub(r"(\.(tar|zip|csv|tsv|txt|jsonl?|parquet|arrow))+$", "", Path(os.path.abspath(path)).name)
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-").lower() or "data"


if __name__ == "__main__":
    script(__file__)
