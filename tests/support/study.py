"""`python -m tests.support.study DATA`: what CUSA's soft labels gain on real photos with real towers, against a shuffled control.

DATA is a root of shards with the splits train and val. Features, teachers and every run lie below --runs; a finished run is not run
again, so the study can be stopped at any time. Figures are of the last step (nothing is chosen on val); temperatures are chosen on folds
of train. The page docs/results/real-photos.md is made from the JSON file of the finished runs, without a photo. A page in --runs shows
50 queries with their photos, and belongs to nobody's repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itm.config import Recipe, parse_recipe
from itm.data import files
from itm.data.manifest import NAME, Manifest, receipt_uri
from itm.data.preprocess import ImageInput, Inputs
from itm.data.shards import Sample, read_manifest, read_samples

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs/results/real-photos.json"
METRICS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum")
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


def trained(recipe: Recipe, split: str = "val") -> dict[str, float]:
    """Train (or take a finished run) and measure on a split, on the features that training read: photos would cost 25 CPU-seconds a run."""
    import itm
    from pipelines.train import train

    done = train(recipe)
    matcher = itm.load_matcher(done["matcher"])
    return {**measured(matcher, recipe, split), "seconds": done["seconds"]}


def scores_of(matchers: list[Any], recipe: Recipe, split: str) -> tuple[Any, Any]:
    """Mean (I,T) scores of some matchers, and the split as the last of them sees it."""
    from itm.evaluation.dataset import checked, encode_shard, shards_of
    from itm.evaluation.scoring import score_matrix

    folder = files.join(recipe.data.root, split)
    manifest = read_manifest(folder)
    first = next(s for s in read_samples(files.join(folder, manifest.shards[0].name)) if isinstance(s, Sample))
    found = []
    for matcher in matchers:
        matcher.inputs = Inputs(ImageInput.trained_on(recipe.data, first.regions), matcher.inputs.tokenizer)
        encoded = checked([encode_shard(matcher, uri, sha256, 256) for uri, sha256 in shards_of(folder, manifest)], folder, 0.0)
        found.append(score_matrix(matcher, encoded.images, encoded.captions))
    return sum(found) / len(found), encoded


def measured(matcher: Any, recipe: Recipe, split: str) -> dict[str, float]:
    from itm.evaluation.metrics import retrieval_metrics

    scores, encoded = scores_of(matcher if isinstance(matcher, list) else [matcher], recipe, split)
    return {name: float(value) for name, value in retrieval_metrics(scores, encoded.positives).items() if name in METRICS}


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
