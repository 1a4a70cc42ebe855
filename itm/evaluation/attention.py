"""Where a matcher that attends looks: the weights of one pair, the words behind the tokens, and where the image's parts lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from itm.data.preprocess import decode, framed, read_regions
from itm.data.shards import Sample
from itm.types import Encoded, Matcher


def looks(matcher: Matcher, image: Encoded, caption: Encoded) -> torch.Tensor | None:
    """(L,R) on the CPU of one pair, which lies where the matcher does: padding is left out. None for a matcher that does not attend."""
    if image.parts is None or caption.parts is None:
        return None
    with torch.no_grad():
        try:
            found = matcher.attention(image, caption)
        except NotImplementedError:
            return None
    if found is None:
        return None
    regions, words = (slice(None) if rows.mask is None else rows.mask[0].cpu() for rows in (image, caption))
    return found[0].float().cpu()[words][:, regions]


def spelled(tokenizer: Any, text: str) -> list[str]:
    """The word, or piece of one, behind each token of a caption; '' for start, end and padding."""
    ids = tokenizer([text])[0][0].tolist()
    if (hf := getattr(tokenizer, "hf", None)) is not None:
        special = set(hf.all_special_ids)
        return ["" if token in special else hf.decode([token]).strip() for token in ids]
    names = {number: word for word, number in tokenizer.word2idx.items()}
    return ["" if token < 3 else names[token] for token in ids]  # pad, start, end


def places(form: Any, sample: Sample, parts: int) -> list[list[float]] | None:
    """x1 y1 x2 y2 of the regions or patches of a sample, in units of its image; None where nobody knows. form: the matcher's."""
    if form.kind == "regions":
        return _regions(sample, form, parts)
    side = math.isqrt(parts)
    if sample.image is None or side * side != parts:
        return None
    left, top, right, bottom = framed(*decode(sample.image, form.exif).size, form.size, form.crop)
    across, down = np.linspace(left, right, side + 1), np.linspace(top, bottom, side + 1)
    return _rounded([(across[c], down[r], across[c + 1], down[r + 1]) for r in range(side) for c in range(side)])


def _regions(sample: Sample, form: Any, parts: int) -> list[list[float]] | None:
    if sample.regions is None:
        return None
    held = read_regions(sample.regions, form.max_regions, form.region_width)
    boxes = held["boxes"][held["mask"]][:, :4]
    return _rounded(boxes.tolist()) if len(boxes) == parts and boxes.any() else None


def _rounded(boxes: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(float(value), 4) for value in box] for box in boxes]
