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
