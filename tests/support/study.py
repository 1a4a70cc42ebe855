"""`python -m tests.support.study DATA`: what CUSA's soft labels gain on real photos with real towers, against a shuffled control.

DATA is a root of shards with the splits train and val. Features, teachers and every run lie below --runs; a finished run is not run
again, so the study can be stopped at any time. Figures are of the last step (nothing is chosen on val); temperatures are chosen on folds
of train. The page docs/results/real-photos.md is made from the JSON file of the finished runs, without a photo. A page in --runs shows
50 queries with their photos, and belongs to nobody's repository.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itm.config import Recipe, parse_recipe
from itm.data import files
from itm.data.preprocess import ImageInput, Inputs
from itm.data.shards import Sample, read_manifest, read_samples
from itm.evaluation.metrics import chance_metrics, retrieval_metrics
from tests.support.study_loop import checked, explored, vectors_of
from tests.support.study_page import (
    ABOUT,
    FOLDS_ABOUT,
    METRICS,
    PLAIN_ABOUT,
    WHY,
    differences,
    gains,
    gains_svg,
    loop_table,
    queries,
    table,
)

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs/results/real-photos.json"
MINILM = {"kind": "hf_text", "path": "minilm", "freeze": True}
WORDS = {"kind": "hf", "path": "minilm", "max_length": 32, "clean": False}
Ids = tuple[Tensor, Tensor]
"""Of the photos (I,), and of the photo of each caption (T,)."""
TRUE, SHUFFLED, NONE = "true", "shuffled", "none"


@dataclass(frozen=True)
class Variant:
    """A way of training: which teacher, and the weights of the two soft-label terms."""

    name: str
    teacher: str = NONE
    csa: float = 0.0
    usa: float = 0.0


BASE, CONTROL, CUSA = Variant("base"), Variant("shuffled", SHUFFLED, 1, 1), Variant("CUSA", TRUE, 1, 1)
ALONE = (Variant("USA alone", TRUE, 0, 1), Variant("CSA alone", TRUE, 1, 0))


@dataclass(frozen=True)
class Study:
    """Where everything lies. data: shards of photos; runs: what the study makes."""

    data: str
    runs: Path

    def root(self, cells: int) -> str:
        return str(self.runs / f"grid{cells}")

    def recipe(self, name: str, cells: int, model: dict[str, Any], **more: Any) -> Recipe:
        """A recipe on the features of so many cells a side; `more` are sections, which are merged into the usual ones."""
        tower = {"kind": "efficientnet_lite0", "options": {"cells": cells, "freeze": True}}
        said = {
            "name": name,
            "output": str(self.runs / "runs"),
            "data": {"root": self.root(cells), "crop": "squash", "val_split": "", "test_split": "val", "shuffle_pairs": "all"},
            "features": {"photos": self.data, "encoder": tower},
            "text": WORDS,
            "model": model,
            "registry": {"experiment": "real-photos"},
        }
        for section, choices in more.items():
            said[section] = {**said.get(section, {}), **choices} if isinstance(choices, dict) else choices
        return parse_recipe(said)

    def teachers(self, cells: int, teacher: str, seed: int = 7) -> dict[str, Any]:
        mean = f"{self.root(cells)}/train/mean.npy"
        true = {"image": {"kind": "region_mean", "options": {"width": 1280, "centre": mean}}, "text": {"kind": "minilm", "options": {}}}
        if teacher != SHUFFLED:
            return true
        return {name: {"kind": "shuffled", "options": {"of": part, "seed": seed}} for name, part in true.items()}


def dual(options: dict[str, Any] | None = None) -> dict[str, Any]:
    image = {"kind": "efficientnet_lite0", "cells": 1, "freeze": True}
    return {"kind": "dual", "options": {"image": image, "text": MINILM, "width": 256, **(options or {})}}


STUDENT = 0.45
"""Where the students' temperatures begin, as published; they are learned."""


def soft(variant: Variant, tau: float, itc: dict[str, Any], head: str = "linear") -> dict[str, Any]:
    """The method of a variant: its ranking term, and CUSA's two terms with the teacher's temperature."""
    said: dict[str, Any] = {"csa": False, "usa": False, "itc": itc}
    if variant.csa:
        said["csa"] = {"weight": variant.csa, "student": STUDENT, "teacher": tau}
    if variant.usa:
        said["usa"] = {"weight": variant.usa, "student": STUDENT, "teacher": tau, "head": head}
    return {"kind": "cusa", "options": said}


def scores_of(recipe: Recipe, matcher_uri: str, split: str = "val") -> tuple[Tensor, Any]:
    """(I,T) scores of a matcher folder on the features that training read (photos would cost 25 CPU-seconds a run), and the split as it
    sees it."""
    import itm
    from itm.evaluation.dataset import checked, encode_shard, shards_of
    from itm.evaluation.scoring import score_matrix
    from itm.matchers.encoders.features import remember_captions

    folder = files.join(recipe.data.root, split)
    manifest = read_manifest(folder)
    matcher = itm.load_matcher(matcher_uri)
    matcher.inputs = Inputs(ImageInput.trained_on(recipe.data, next(samples_of(folder)).regions), matcher.inputs.tokenizer)
    text: Any = matcher.encoders()["text"]
    if remember_captions(text, manifest.captions):
        text.training = True  # of a frozen encoder: it asks its memory, and its model stays as it is
    encoded = checked([encode_shard(matcher, shard, sha256, 256) for shard, sha256 in shards_of(folder, manifest)], folder, 0.0)
    return score_matrix(matcher, encoded.images, encoded.captions), encoded


@dataclass(frozen=True)
class Run:
    """One training of the study: which table and row it belongs to, its recipe, and of an ensemble the runs whose mean score it is."""

    table: str
    row: str
    seed: int
    recipe: Recipe
    members: tuple[Run, ...] = ()

    @property
    def name(self) -> str:
        return self.recipe.name.replace("/", "-")

    def result(self, study: Study) -> dict[str, Any]:
        """As it is stored, else made now: train, measure, store. The scores are kept too, for ensembles."""
        path = study.runs / "results" / f"{self.name}.json"
        if self.is_done(study):
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        began, cpu = time.time(), time.process_time()
        scores, ids, about = self._mean(study) if self.members else self._trained()
        (study.runs / "scores").mkdir(exist_ok=True)
        np.savez(study.runs / "scores" / f"{self.name}.npz", scores=scores.numpy(), images=ids[0].numpy(), captions=ids[1].numpy())
        metrics = {name: float(value) for name, value in retrieval_metrics(scores, ids).items() if name in METRICS}
        said = {"table": self.table, "row": self.row, "seed": self.seed, "metrics": metrics, **about}
        said |= {"cpu": round(time.process_time() - cpu, 1), "wall": round(time.time() - began, 1)}
        files.write_atomic(str(path), json.dumps(said, indent=1).encode())
        print(f"{self.name}: rSum {metrics['rsum']:.1f}, {said['cpu']:.0f} CPU-seconds, {said['wall']:.0f} s", flush=True)
        return said

    def is_done(self, study: Study) -> bool:
        return (study.runs / "results" / f"{self.name}.json").exists()

    def scores(self, study: Study) -> tuple[Tensor, Ids]:
        """(I,T) scores on val, and whose they are, of a run that is done."""
        with np.load(study.runs / "scores" / f"{self.name}.npz", allow_pickle=False) as held:
            return torch.from_numpy(held["scores"]), (torch.from_numpy(held["images"]), torch.from_numpy(held["captions"]))

    def _trained(self) -> tuple[Tensor, Ids, dict[str, Any]]:
        from pipelines.teach import teach
        from pipelines.train import train

        if self.recipe.teachers.image is not None:
            teach(self.recipe)
        scores, encoded = scores_of(self.recipe, train(self.recipe)["matcher"])
        losses = [json.loads(line) for line in Path(self.recipe.folder, "losses.jsonl").read_text().splitlines()]
        return scores, encoded.positives, {"fingerprint": self.recipe.fingerprint(), "last": losses[-1]}

    def _mean(self, study: Study) -> tuple[Tensor, Ids, dict[str, Any]]:
        each = [member.scores(study) for member in self.members]
        return torch.stack([scores for scores, _ in each]).mean(0), each[0][1], {}


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


LATE_STEPS, LATE_BATCH, LATE_SEEDS, LATE_TAU, CELLS = 200, 32, 3, 0.25, 5
LATE_TRAIN = {"workers": 0, "steps": LATE_STEPS, "batch_size": LATE_BATCH, "lr": 5e-4, "log_every": 100, "checkpoint_every": LATE_STEPS}
LATE_NCE = {"tau": 0.07, "reduction": "sum"}  # learned: the scores of these models have other ranges
LATE: dict[str, dict[str, Any]] = {
    "scan": {"agg_func": "Mean"},
    "uarda": {"direction": "t2i"},
    "saf": {"sim_dim": 64, "regions": CELLS * CELLS},
    "sgr": {"sim_dim": 64, "regions": CELLS * CELLS},
}


def late_run(study: Study, kind: str, variant: Variant, seed: int) -> Run:
    """A late-interaction matcher on 25 grid regions and MiniLM's words, both frozen, with the losses of the dual encoder."""
    image = {"kind": "efficientnet_lite0", "cells": CELLS, "freeze": True}
    recipe = study.recipe(
        f"late/{kind}-{variant.name.replace(' ', '-')}/{seed}",
        CELLS,
        {"kind": kind, "options": {"image": image, "text": MINILM, **LATE[kind]}},
        data={"cache_features": True},
        method=soft(variant, LATE_TAU, LATE_NCE),
        train=LATE_TRAIN,
        teachers=study.teachers(CELLS, variant.teacher) if variant.teacher != NONE else {},
        seed=seed,
    )
    return Run(kind, variant.name, seed, recipe)


def late_runs(study: Study, seeds: Iterable[int]) -> Iterator[Run]:
    for seed in seeds:
        for kind in LATE:
            for variant in (BASE, CONTROL, CUSA, *(ALONE if kind == "scan" else ())):
                yield late_run(study, kind, variant, seed)
        for variant in (BASE, CONTROL, CUSA):
            pair = tuple(late_run(study, kind, variant, seed) for kind in ("sgr", "saf"))
            recipe = pair[0].recipe.model_copy(update={"name": f"late/sgraf-{variant.name}/{seed}"})
            yield Run("sgraf", variant.name, seed, recipe, pair)


def tried(study: Study) -> None:
    """What the temperatures are chosen by: plain torch on folds of train; and the chosen ones on val."""
    train, val = (vectors_of(files.join(study.root(1), split), study.runs / f"vectors-{split}.npz") for split in ("train", "val"))
    explored(train, study.runs / "loop", (0, 3), (0, 1))
    checked(train, val, study.runs / "loop", tuple(range(DUAL_SEEDS)))


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
    order = {row: n for n, row in enumerate(["base", "shuffled", "CUSA", "USA alone", "CSA alone"])}
    results.sort(key=lambda r: (r["table"], next((n for row, n in order.items() if r["row"].endswith(row)), 9), r["seed"]))
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


def tables_of(runs: list[dict[str, Any]]) -> list[str]:
    return [name for name in ("dual", *LATE, "sgraf") if any(r["table"] == name for r in runs)]


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
        lines += [*about.get(name, []), *([] if name == "dual" else ["", f"### {name}"])]
        lines += ["", *table(runs, name, known), "", *gains(runs, name, list(VERSUS))]
        if name == "dual":
            val, folds = ([r for r in said["loop"] if r["on"] == on] for on in ("val", "fold"))
            plain = [r | {"table": "val", "row": r["arm"], "metrics": {"rsum": r["rsum"]}} for r in val]
            against = [*VERSUS, ("CSA alone", "base"), ("USA alone", "base")]
            lines += [
                "",
                PLAIN_ABOUT,
                "",
                *loop_table(val),
                "",
                *gains(plain, "val", against),
                "",
                FOLDS_ABOUT,
                "",
                *loop_table(folds),
                "",
                WHY,
            ]
    missing = [name for name in ("dual", *LATE, "sgraf") if name not in tables_of(runs)]
    lines += ["", f"Not run yet: {', '.join(missing)}."] if missing else []
    cpu = sum(r["cpu"] for r in runs)
    return "\n".join([*lines, "", f"{len(runs)} runs, {cpu / 60:.0f} CPU-minutes."]) + "\n"


DUAL_ABOUT = f"""One linear layer a side to 256 dimensions, InfoNCE with a fixed temperature of {DUAL_NCE["tau"]}, {DUAL_STEPS} steps of
{DUAL_BATCH}, rate 1e-3 falling to 0. CSA and USA have weight 1; their students' temperatures begin with {STUDENT} and are learned, the
teacher's is {DUAL_TAU}: what `itm inspect` suggests for batches of 128, and best on the folds below. USA reads the retrieval vectors."""
LATE_ABOUT = f"""{CELLS * CELLS} pooled grid regions and MiniLM's words, {LATE_STEPS} steps of {LATE_BATCH}, InfoNCE with a learned
temperature; CSA, USA and their students as above, teacher's temperature {LATE_TAU}, which `itm inspect` suggests for this batch. USA has a
linear layer of its own (`usa.head`), SGRAF is the mean of the scores of SGR and SAF."""


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


def samples_of(folder: str) -> Iterator[Sample]:
    """What can be read of a split, in its order."""
    for shard in read_manifest(folder).shards:
        yield from (item for item in read_samples(files.join(folder, shard.name)) if isinstance(item, Sample))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="root of the shards of photos")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "study"), help="where everything lies")
    parser.add_argument("--only", choices=["dual", "loop", "late", "pages"], help="a part of it")
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
    if args.only in (None, "late"):
        prepare(study, CELLS)
        for run in late_runs(study, args.seeds or range(LATE_SEEDS)):
            run.result(study)
    if args.only in (None, "pages"):
        pages(study)
        if (shown := dual_run(study, CUSA, 0)).is_done(study):
            print(f"queries: {show_queries(study, shown)}")


if __name__ == "__main__":
    main()
