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
from itm.data.manifest import NAME, Manifest, receipt_uri
from itm.data.preprocess import ImageInput, Inputs
from itm.data.shards import Sample, read_manifest, read_samples
from itm.evaluation.metrics import chance_metrics, retrieval_metrics
from tests.support.study_page import METRICS, gains, queries, table

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs/results/real-photos.json"
MINILM = {"kind": "hf_text", "path": "minilm", "freeze": True}
WORDS = {"kind": "hf", "path": "minilm", "max_length": 32, "clean": False}
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


def soft(variant: Variant, tau: float, itc: dict[str, Any], head: str = "linear") -> dict[str, Any]:
    """The method of a variant: its ranking term, and CUSA's two terms with the teacher's temperature."""
    said: dict[str, Any] = {"csa": False, "usa": False, **itc}
    if variant.csa:
        said["csa"] = {"weight": variant.csa, "student": "itc", "teacher": tau}
    if variant.usa:
        said["usa"] = {"weight": variant.usa, "student": "itc", "teacher": tau, "head": head}
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


def fold(study: Study, cells: int, held_out: int) -> str:
    """A root whose split `train` lacks one shard of train, which is its split `val`; features and teachers are those of the whole."""
    import shutil

    whole, root = Path(study.root(cells)) / "train", study.runs / f"fold{held_out}-grid{cells}"
    if not (root / "val" / NAME).exists():
        manifest = read_manifest(str(whole))
        parts = {"train": [s for n, s in enumerate(manifest.shards) if n != held_out], "val": [manifest.shards[held_out]]}
        for split, shards in parts.items():
            shutil.rmtree(root / split, ignore_errors=True)
            shutil.copytree(whole / "teachers", root / split / "teachers") if split == "train" else (root / split).mkdir(parents=True)
            for shard in shards:
                for uri in (str(whole / shard.name), receipt_uri(str(whole / shard.name))):
                    shutil.copy(uri, root / split)
            shutil.copy(whole / "features.json", root / split)
            about = Manifest(split=split, source=manifest.source, shards=shards, format=manifest.format)
            (root / split / NAME).write_text(about.model_dump_json())
    return str(root)


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
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        began, cpu = time.time(), time.process_time()
        scores, positives, about = self._mean(study) if self.members else self._trained()
        (study.runs / "scores").mkdir(exist_ok=True)
        np.savez(study.runs / "scores" / f"{self.name}.npz", scores=scores.numpy(), positives=positives.numpy())
        metrics = {name: float(value) for name, value in retrieval_metrics(scores, positives).items() if name in METRICS}
        said = {"table": self.table, "row": self.row, "seed": self.seed, "metrics": metrics, **about}
        said |= {"cpu": round(time.process_time() - cpu, 1), "wall": round(time.time() - began, 1)}
        files.write_atomic(str(path), json.dumps(said, indent=1).encode())
        print(f"{self.name}: rSum {metrics['rsum']:.1f}, {said['cpu']:.0f} CPU-seconds, {said['wall']:.0f} s", flush=True)
        return said

    def scores(self, study: Study) -> tuple[Tensor, Tensor]:
        """(I,T) scores on val, and which pairs belong together, of a run that is done."""
        with np.load(study.runs / "scores" / f"{self.name}.npz", allow_pickle=False) as held:
            return torch.from_numpy(held["scores"]), torch.from_numpy(held["positives"])

    def _trained(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        from pipelines.teach import teach
        from pipelines.train import train

        if self.recipe.teachers.image is not None:
            teach(self.recipe)
        scores, encoded = scores_of(self.recipe, train(self.recipe)["matcher"])
        losses = [json.loads(line) for line in Path(self.recipe.folder, "losses.jsonl").read_text().splitlines()]
        return scores, encoded.positives, {"fingerprint": self.recipe.fingerprint(), "last": losses[-1]}

    def _mean(self, study: Study) -> tuple[Tensor, Tensor, dict[str, Any]]:
        each = [member.scores(study) for member in self.members]
        return torch.stack([scores for scores, _ in each]).mean(0), each[0][1], {}


DUAL_STEPS, DUAL_BATCH, DUAL_SEEDS = 300, 128, 4
DUAL_TRAIN = {"workers": 0, "steps": DUAL_STEPS, "batch_size": DUAL_BATCH, "lr": 1e-3, "log_every": 100, "checkpoint_every": DUAL_STEPS}
INFO_NCE = {"itc": {"tau": 0.07, "reduction": "sum"}}
TAUS = (0.1, 0.2)


def dual_run(study: Study, variant: Variant, tau: float, seed: int, fold_of: int | None = None, **train: Any) -> Run:
    row = f"{variant.name} tau {tau:g}" if variant.teacher != NONE else variant.name
    root = {} if fold_of is None else {"root": fold(study, 1, fold_of)}
    place = "dual" if fold_of is None else f"fold{fold_of}"
    recipe = study.recipe(
        f"{place}/{row.replace(' ', '-')}/{seed}",
        1,
        dual(),
        data={"cache_features": True, **root},
        method=soft(variant, tau, INFO_NCE, head="none"),
        train=DUAL_TRAIN | train,
        teachers=study.teachers(1, variant.teacher) if variant.teacher != NONE else {},
        seed=seed,
    )
    return Run(place, row, seed, recipe)


def dual_runs(study: Study, seeds: Iterable[int]) -> Iterator[Run]:
    for seed in seeds:
        yield dual_run(study, BASE, 0.1, seed)
        for tau in TAUS:
            yield dual_run(study, CONTROL, tau, seed)
            yield dual_run(study, CUSA, tau, seed)
        for variant in ALONE:
            yield dual_run(study, variant, 0.1, seed)


LATE_STEPS, LATE_BATCH, LATE_SEEDS, LATE_TAU, CELLS = 200, 32, 3, 0.25, 5
LATE_TRAIN = {"workers": 0, "steps": LATE_STEPS, "batch_size": LATE_BATCH, "lr": 5e-4, "log_every": 100, "checkpoint_every": LATE_STEPS}
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
        method=soft(variant, LATE_TAU, INFO_NCE),
        train=LATE_TRAIN,
        teachers=study.teachers(CELLS, variant.teacher) if variant.teacher != NONE else {},
        seed=seed,
    )
    return Run(kind, f"{kind} {variant.name}", seed, recipe)


def late_runs(study: Study, seeds: Iterable[int]) -> Iterator[Run]:
    for seed in seeds:
        for kind in LATE:
            for variant in (BASE, CONTROL, CUSA, *(ALONE if kind == "scan" else ())):
                yield late_run(study, kind, variant, seed)
        for variant in (BASE, CONTROL, CUSA):
            pair = tuple(late_run(study, kind, variant, seed) for kind in ("sgr", "saf"))
            recipe = pair[0].recipe.model_copy(update={"name": f"late/sgraf-{variant.name}/{seed}"})
            yield Run("sgraf", f"sgraf {variant.name}", seed, recipe, pair)


def fold_runs(study: Study, seeds: Iterable[int]) -> Iterator[Run]:
    """What the temperature is chosen by: a sixth of train is held out, in turn."""
    for seed in seeds:
        for held_out in (0, 3):
            for tau in TAUS:
                yield dual_run(study, CUSA, tau, seed, held_out)


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
    """docs/results/real-photos.md and .json, from the finished runs."""
    results = [json.loads(path.read_text()) for path in sorted((study.runs / "results").glob("*.json"))]
    if not results:
        return
    order = {row: n for n, row in enumerate(["base", "shuffled", "CUSA", "USA alone", "CSA alone"])}
    results.sort(key=lambda r: (r["table"], next((n for row, n in order.items() if row in r["row"]), 9), r["row"], r["seed"]))
    RESULT.write_text(json.dumps({"chance": chance(study), "runs": results}, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(page_of(RESULT), encoding="utf-8")


def chance(study: Study) -> dict[str, float]:
    """Of val: what random scores give."""
    counts = [len(sample.captions) for sample in samples_of(files.join(study.data, "val"))]
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    found = chance_metrics(torch.arange(len(counts))[:, None] == owner[None, :])
    return {name: float(found[name]) for name in METRICS}


def page_of(result: Path) -> str:
    """The page beside the JSON file, from it alone."""
    said = json.loads(result.read_text())
    runs, known = said["runs"], said["chance"]
    late = [name for name in (*LATE, "sgraf") if any(r["table"] == name for r in runs)]
    versus = [("CUSA", "shuffled"), ("CUSA", "base"), ("shuffled", "base")]
    dual_pairs = [(f"{a} tau {tau:g}", b if b == "base" else f"{b} tau {tau:g}") for tau in TAUS for a, b in versus]
    lines = [ABOUT, "", "## Dual encoder", "", DUAL_ABOUT, "", *table(runs, "dual", known), "", *gains(runs, "dual", dual_pairs)]
    folds = [r | {"table": "folds"} for r in runs if r["table"].startswith("fold")]
    if folds:
        lines += ["", "The temperature, on held-out sixths of train:", "", *table(folds, "folds", known)[:-1]]
    if late:
        lines += ["", "## Late interaction", "", LATE_ABOUT]
    for name in late:
        pairs = [(f"{name} {a}", f"{name} {b}") for a, b in versus]
        lines += ["", f"### {name}", "", *table(runs, name, known), "", *gains(runs, name, pairs)]
    return "\n".join(lines) + "\n"


ABOUT = """# Real photos

`make study DATA=<folder>` makes this page: 600 COCO photos to learn from and 201 with 1,000 captions to be asked about, and real frozen
towers of the extra `real`: EfficientNet-Lite0 (ImageNet) for photos, MiniLM for sentences. Teachers are the same two models: the mean of
the grid cells less the mean of train, and the sentence vector. The shuffled control has the same vectors, each of another photo or caption.
Figures are of the last step, nothing is chosen on the 201 photos; mean ± standard deviation over seeds. Every run trains on kept features
(`data.cache_features`). These are small models on few photos: rows are compared with each other, not with published figures."""
DUAL_ABOUT = f"""One linear layer a side to 256 dimensions, InfoNCE, {DUAL_STEPS} steps of {DUAL_BATCH}; CSA and USA with weight 1, the
student's temperature is that of InfoNCE, the teacher's is tau.

A loop of plain torch with the same losses and 300 steps on the same vectors gave 343.2, 328.4 and 340.8 (2 seeds each) for base, shuffled
and CUSA with tau 0.1: the order is that of the setting and not of the pipeline. InfoNCE learns its temperature: alone it ends at 0.025,
with soft labels at 0.05. The true teacher is above its shuffled control; here it is not above no teacher."""
LATE_ABOUT = f"""{CELLS * CELLS} pooled grid regions and MiniLM's words, {LATE_STEPS} steps of {LATE_BATCH}, triplet loss (its mean);
weights of CSA and USA as published for SGR and SAF, those of SGR for SCAN and UARDA; temperatures begin with {LATE_TAU}."""


def show_queries(study: Study, run: Run, count: int = 50) -> Path:
    """`count` captions of val with the first photo that is not theirs."""
    scores, positives = run.scores(study)
    photos, texts, owner = [], [], []
    for sample in samples_of(files.join(study.data, "val")):
        photos.append(sample.image or b"")
        texts += [caption.text for caption in sample.captions]
        owner += [len(photos) - 1] * len(sample.captions)
    if not torch.equal(positives.bool(), torch.arange(len(photos))[:, None] == torch.tensor(owner)[None, :]):
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
    parser.add_argument("--only", choices=["dual", "folds", "late", "pages"], help="a part of it")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds of it")
    args = parser.parse_args()
    study = Study(files.absolute(args.data), Path(files.absolute(args.runs)))
    if args.only in (None, "dual", "folds"):
        prepare(study, 1)
    if args.only in (None, "dual"):
        for run in dual_runs(study, args.seeds or range(DUAL_SEEDS)):
            run.result(study)
    if args.only in (None, "folds"):
        for run in fold_runs(study, args.seeds or range(2)):
            run.result(study)
    if args.only in (None, "late"):
        prepare(study, CELLS)
        for run in late_runs(study, args.seeds or range(LATE_SEEDS)):
            run.result(study)
    if args.only in (None, "pages"):
        pages(study)
        print(f"queries: {show_queries(study, dual_run(study, CUSA, 0.1, 0))}")


if __name__ == "__main__":
    main()
