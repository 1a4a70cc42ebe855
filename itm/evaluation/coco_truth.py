"""The wider truths of COCO 5K: ECCV Caption and CxC, read from the data files of the `eccv-caption` package (its code is not used)."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class WiderTruth:
    """Positives of each direction; the two need not be transposes of each other (ECCV asks other queries each way).

    i2t (I,T) bool, t2i (T,I) bool; i2t_absent (I,), t2i_absent (T,) int64: positives that lie outside the gallery but count in R.
    """

    i2t: Tensor
    t2i: Tensor
    i2t_absent: Tensor
    t2i_absent: Tensor


def data_folder() -> Path:
    """Raises ValueError when the package is not installed."""
    spec = importlib.util.find_spec("eccv_caption")
    if spec is None or spec.origin is None:
        raise ValueError("the protocols eccv and cxc need the truth files of a package: pip install eccv-caption==0.1.0")
    return Path(spec.origin).parent / "data"


def relevance(truth: str, image_keys: Sequence[str], caption_ids: Sequence[str], metas: Sequence[Mapping[str, object]] = ()) -> WiderTruth:
    """truth: `eccv` or `cxc`. Ids are COCO's: caption annotation ids, and image ids from metadata (`cocoid`, `image_id`) or the key.

    Raises ValueError when ids are no numbers or most queries of the truth are missing from the split.
    """
    images = [_image_id(key, metas[row] if metas else {}) for row, key in enumerate(image_keys)]
    captions = [_number(c, "caption id") for c in caption_ids]
    i2t, i2t_absent, i2t_found = _positives(data_folder() / f"{truth}_image_to_caption.json", images, captions)
    t2i, t2i_absent, t2i_found = _positives(data_folder() / f"{truth}_caption_to_image.json", captions, images)
    for way, (found, asked) in (("images", i2t_found), ("captions", t2i_found)):
        if found < asked:
            raise ValueError(
                f"protocol {truth} asks {asked:,} {way}, but this split holds only {found:,} of them; it is defined on COCO 5K test"
            )
    return WiderTruth(i2t, t2i, i2t_absent, t2i_absent)


def _positives(path: Path, queries: list[int], gallery: list[int]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    listed: dict[str, list[int]] = json.loads(path.read_text())
    row_of, column_of = ({name: place for place, name in enumerate(names)} for names in (queries, gallery))
    truth = torch.zeros(len(queries), len(gallery), dtype=torch.bool)
    absent = torch.zeros(len(queries), dtype=torch.int64)
    pairs: list[tuple[int, int]] = []
    for name, positives in listed.items():
        row = row_of.get(int(name))
        if row is not None:
            inside = [column_of[p] for p in set(positives) if p in column_of]
            pairs += [(row, column) for column in inside]
            absent[row] = len(set(positives)) - len(inside)
    if pairs:
        rows, columns = torch.tensor(pairs).T
        truth[rows, columns] = True
    return truth, absent, (sum(int(name) in row_of for name in listed), len(listed))


def _image_id(key: str, meta: Mapping[str, object]) -> int:
    for name in ("cocoid", "image_id"):
        if str(meta.get(name, "")).isdigit():
            return int(str(meta[name]))
    digits = re.findall(r"\d+", key)
    return _number(digits[-1] if digits else key, "image key")


def _number(text: str, what: str) -> int:
    if not str(text).isdigit():
        raise ValueError(f"{what} {text!r} is no COCO number; the protocols eccv and cxc need COCO's own ids")
    return int(text)
