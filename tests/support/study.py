"""`python -m tests.support.study DATA`: what CUSA's soft labels gain on real photos with real towers, against a shuffled control.

DATA is a root of shards with the splits train and val. Features, teachers and every run lie below --runs; a finished run is not run
again, so the study can be stopped at any time. Figures are of the last step (nothing is chosen on val); temperatures are chosen on folds
of train. The page docs/results/real-photos.md is made from the JSON file of the finished runs, without a photo. A page in --runs shows
50 queries with their photos, and belongs to nobody's repository.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from itm.data import files
from itm.evaluation.metrics import chance_metrics
from tests.support.study_late import ABOUT as LATE_ABOUT
from tests.support.study_late import CELLS, LATE, LONG, LONG_STEPS, SEEDS, SOFTER, folded, late_runs
from tests.support.study_late import WHY as LATE_WHY
from tests.support.study_loop import checked, explored, lengthened, vectors_of
from tests.support.study_page import (
    ABOUT,
    FOLDS_ABOUT,
    METRICS,
    PLAIN_ABOUT,
    QUERIES_ABOUT,
    WHY,
    differences,
    gains,
    gains_svg,
    loop_table,
    queries,
    table,
)
from tests.support.study_runs import (
    ALONE,
    BASE,
    CONTROL,
    CUSA,
    NONE,
    SHUFFLED,
    STUDENT,
    TRUE,
    Run,
    Study,
    Variant,
    dual,
    samples_of,
    soft,
)

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs/results/real-photos.json"
DUAL_STEPS, DUAL_BATCH, DUAL_SEEDS, DUAL_TAU = 300, 128, 4, 0.2
DUAL_TRAIN = {"workers": 0, "steps": DUAL_STEPS, "batch_size": DUAL_BATCH, "lr": 1e-3, "log_every": 100, "checkpoint_every": DUAL_STEPS}
DUAL_NCE = {"tau": 0.05, "learn_tau": False, "reduction": "sum"}


def dual_run(study: Study, variant: Variant, seed: int) -> Run:
    recipe = study.recipe(
        f"dual/{variant.name.replace(' ', '-')}/{seed}",
        1,
        dual(),
        data={"cache_features": True},
        method=soft(variant, DUAL_TAU, DUAL_NCE, head="none"),
        train=DUAL_TRAIN,
        teachers=study.teachers(1, variant.teacher) if variant.teacher != NONE else {},
        seed=seed,
    )
    return Run("dual", variant.name, seed, recipe)


def dual_runs(study: Study, seeds: Iterable[int]) -> Iterator[Run]:
    for seed in seeds:
        for variant in (BASE, CONTROL, CUSA, *ALONE):
            yield dual_run(study, variant, seed)


def tried(study: Study) -> None:
    """What the temperatures are chosen by: plain torch on folds of train; and the chosen ones on val."""
    train, val = (vectors_of(files.join(study.root(1), split), study.runs / f"vectors-{split}.npz") for split in ("train", "val"))
    explored(train, study.runs / "loop", (0, 3), (0, 1))
    checked(train, val, study.runs / "loop", tuple(range(DUAL_SEEDS)))
    lengthened(train, val, study.runs / "loop", tuple(range(DUAL_SEEDS)))


def prepare(study: Study, cells: int) -> None:
    """Features and teacher vectors, where they are not made yet."""
    from pipelines.features import features
    from pipelines.teach import teach

    for teacher in (TRUE, SHUFFLED):
        recipe = study.recipe("prepare", cells, dual(), teachers=study.teachers(cells, teacher))
        if teacher == TRUE:
            features(recipe)
        teach(recipe)


def pages(study: Study) -> None:
    """docs/results/real-photos.md, .json and .svg, from the finished runs."""
    results = [json.loads(path.read_text()) for path in sorted((study.runs / "results").glob("*.json"))]
    if not results:
        return
    order = ["base", "shuffled", "CUSA", "USA alone", "CSA alone"]
    results.sort(key=lambda r: (r["table"], order.index(r["row"]) if r["row"] in order else len(order), r["row"], r["seed"]))
    loop = [json.loads(path.read_text()) for path in sorted((study.runs / "loop").glob("*.json"))]
    RESULT.write_text(json.dumps({"chance": chance(study), "loop": loop, "runs": results}, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(page_of(RESULT), encoding="utf-8")
    RESULT.with_suffix(".svg").write_text(picture_of(RESULT), encoding="utf-8")


def chance(study: Study) -> dict[str, float]:
    """Of val: what random scores give."""
    counts = [len(sample.captions) for sample in samples_of(files.join(study.data, "val"))]
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    found = chance_metrics(torch.arange(len(counts))[:, None] == owner[None, :])
    return {name: float(found[name]) for name in METRICS}


VERSUS = (("CUSA", "shuffled"), ("CUSA", "base"), ("shuffled", "base"))
SOFT_VERSUS = tuple((f"{a}, {SOFTER.teacher:g}", b) for a, b in (("CUSA", f"shuffled, {SOFTER.teacher:g}"), ("CUSA", "base")))
TABLES = ("dual", *LATE, "sgraf", LONG)
TITLES = {LONG: f"scan, {LONG_STEPS:,} steps"}


def tables_of(runs: list[dict[str, Any]]) -> list[str]:
    return [name for name in TABLES if any(r["table"] == name for r in runs)]


def picture_of(result: Path) -> str:
    runs = json.loads(result.read_text())["runs"]
    return gains_svg({name: {f"{a} over {b}": differences(runs, name, a, b) for a, b in VERSUS} for name in tables_of(runs)})


def page_of(result: Path) -> str:
    """The page beside the JSON file, from it alone."""
    said = json.loads(result.read_text())
    runs, known = said["runs"], said["chance"]
    lines = [ABOUT, "", "![Gains in rSum, seed by seed](real-photos.svg)"]
    for name in tables_of(runs):
        about = {"dual": ["", "## Dual encoder", "", DUAL_ABOUT], next(iter(LATE)): ["", "## Late interaction", "", LATE_ABOUT]}
        lines += [*about.get(name, []), *([] if name == "dual" else ["", f"### {TITLES.get(name, name)}"])]
        lines += ["", *table(runs, name, known), "", *gains(runs, name, [*VERSUS, *SOFT_VERSUS])]
        if name == "dual":
            lines += about_dual(said["loop"])
    missing = [name for name in TABLES if name not in tables_of(runs)]
    lines += ["", f"Not run yet: {', '.join(missing)}."] if missing else []
    late = [r for r in said["loop"] if r["on"] == "late"]
    lines += ["", LATE_WHY, "", *loop_table(late, "InfoNCE's temperature, the students', the teacher's")] if late else []
    cpu = sum(r["cpu"] for r in runs)
    return "\n".join([*lines, "", f"{len(runs)} runs, {cpu / 60:.0f} CPU-minutes."]) + "\n"


def about_dual(loop: list[dict[str, Any]]) -> Iterator[str]:
    """What plain torch says of the dual encoder, and why the table is as it is."""
    val, folds, lengths = ([r for r in loop if r["on"] == on] for on in ("val", "fold", "length"))
    lengths.sort(key=lambda r: [int(number) for number in reversed(r["setting"].replace(",", "").split(" steps of "))])
    plain = [r | {"table": "val", "row": r["arm"], "metrics": {"rsum": r["rsum"]}} for r in val]
    yield from ("", PLAIN_ABOUT, "", *loop_table(val), "")
    yield from gains(plain, "val", [*VERSUS, ("CSA alone", "base"), ("USA alone", "base")])
    yield from ("", FOLDS_ABOUT, "", *loop_table(folds), "", WHY, "", *loop_table(lengths, "seen"), "", QUERIES_ABOUT)


DUAL_ABOUT = f"""One linear layer a side to 256 dimensions, InfoNCE with a fixed temperature of {DUAL_NCE["tau"]}, {DUAL_STEPS} steps of
{DUAL_BATCH}, rate 1e-3 falling to 0. CSA and USA have weight 1; their students' temperatures begin with {STUDENT} and are learned, the
teacher's is {DUAL_TAU}: what `itm inspect` suggests for batches of 128, and best on the folds below. USA reads the retrieval vectors."""


def show_queries(study: Study, run: Run, count: int = 50) -> Path:
    """`count` captions of val with the first photo that is not theirs."""
    scores, (images, captions) = run.scores(study)
    photos, texts, owner = [], [], []
    for sample in samples_of(files.join(study.data, "val")):
        photos.append(sample.image or b"")
        texts += [caption.text for caption in sample.captions]
        owner += [len(photos) - 1] * len(sample.captions)
    if not torch.equal(images[torch.tensor(owner)], captions):
        raise ValueError(f"the scores of {run.name} are of other photos than those in {study.data}")
    shown = []
    for caption in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:count].tolist():
        order, right = scores[:, caption].argsort(descending=True).tolist(), owner[caption]
        wrong = next(image for image in order if image != right)
        shown.append((texts[caption], photos[right], photos[wrong], order.index(right) + 1))
    path = study.runs / "queries.html"
    queries(path, shown)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="root of the shards of photos")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "study"), help="where everything lies")
    parser.add_argument("--only", choices=["dual", "loop", "folds", "late", "pages"], help="a part of it")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds of it")
    args = parser.parse_args()
    study = Study(files.absolute(args.data), Path(files.absolute(args.runs)))
    if args.only in (None, "dual", "loop"):
        prepare(study, 1)
    if args.only in (None, "loop"):
        tried(study)
    if args.only in (None, "dual"):
        for run in dual_runs(study, args.seeds or range(DUAL_SEEDS)):
            run.result(study)
    if args.only in (None, "late", "folds"):
        prepare(study, CELLS)
    if args.only in (None, "folds"):
        folded(study, args.seeds or [0])
    if args.only in (None, "late"):
        for run in late_runs(study, args.seeds or range(SEEDS)):
            run.result(study)
    if args.only in (None, "pages"):
        pages(study)
        if (shown := dual_run(study, CUSA, 0)).is_done(study):
            print(f"queries: {show_queries(study, shown)}")


if __name__ == "__main__":
    main()
