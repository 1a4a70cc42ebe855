"""What every run of the study on real photos is: a recipe of the pipeline, trained once, with its figures and scores kept in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
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
from itm.evaluation.metrics import retrieval_metrics
from tests.support.study_page import METRICS

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


def soft(variant: Variant, tau: float, itc: dict[str, Any], head: str = "linear", student: float = STUDENT) -> dict[str, Any]:
    """The method of a variant: its ranking term, and CUSA's two terms with the teacher's temperature."""
    said: dict[str, Any] = {"csa": False, "usa": False, "itc": itc}
    if variant.csa:
        said["csa"] = {"weight": variant.csa, "student": student, "teacher": tau}
    if variant.usa:
        said["usa"] = {"weight": variant.usa, "student": student, "teacher": tau, "head": head}
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


def samples_of(folder: str) -> Iterator[Sample]:
    """What can be read of a split, in its order."""
    for shard in read_manifest(folder).shards:
        yield from (item for item in read_samples(files.join(folder, shard.name)) if isinstance(item, Sample))
