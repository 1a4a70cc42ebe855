"""A packed split of scenes with regions and boxes, and small matchers with fresh weights that read it: what a picture of a pair needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from itm.config import Part
from itm.data.preprocess import ImageInput, Inputs
from itm.data.records import Record
from itm.data.sources.scenes import Scenes
from itm.data.text import WordVocabulary
from itm.matchers.folder import build_matcher, save_matcher
from itm.types import Matcher
from tests.support.small_split import write_split

REGIONS = 6
LATE = {"image": {"kind": "regions", "in_width": 358, "width": 12}, "text": {"kind": "gru", "word_dim": 8, "width": 12}}
OPTIONS: dict[str, dict[str, Any]] = {
    "scan": LATE,
    "saf": LATE | {"sim_dim": 8, "regions": REGIONS, "dropout": 0.0},
    "sgr": LATE | {"sim_dim": 8, "regions": REGIONS, "dropout": 0.0, "steps": 3},
    "sgraf": LATE | {"sim_dim": 8, "regions": REGIONS, "dropout": 0.0, "steps": 3},
    "uarda": LATE | {"eval_threshold": "t"},
    "uniter": {"hidden": 12, "layers": 1, "heads": 2, "positions": 32, "region_dim": 358, "init_std": 0.3},
    "dual": {"image": {"kind": "conv", "image_size": 64}, "text": {"kind": "pooled_gru"}, "width": 8},
}
PIXELS = ImageInput(size=64, crop="squash")


def split(folder: Path, count: int = 6) -> list[Record]:
    """`count` scenes, packed as the split `folder`."""
    rows = [r for r in Scenes(world="tiny", n_test=count, regions=True).records("test") if isinstance(r, Record)]
    write_split(folder, rows)
    return rows


def matcher_of(kind: str, rows: list[Record], seed: int = 0, **options: Any) -> Matcher:
    torch.manual_seed(seed)
    words = WordVocabulary.from_captions([caption.text for row in rows for caption in row.captions])
    form = PIXELS if kind == "dual" else ImageInput(kind="regions", max_regions=REGIONS, region_width=358)
    return build_matcher(Part(kind=kind, options=OPTIONS[kind] | options), Inputs(form, words)).eval()


def saved(kind: str, rows: list[Record], folder: Path, **options: Any) -> str:
    save_matcher(matcher_of(kind, rows, **options), str(folder))
    return str(folder)
