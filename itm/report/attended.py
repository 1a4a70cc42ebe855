"""Where a late-interaction matcher looks: for some captions and their images, how much each word looks at each region or patch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from itm.data.formats import Json
from itm.data.manifest import full_key
from itm.data.preprocess import decode, framed, read_regions
from itm.data.shards import Sample, index_shard, read_range
from itm.evaluation.dataset import EncodedSplit
from itm.types import Matcher

WORDS = 12  # of a caption, at most


def attended(matcher: Matcher, split: EncodedSplit, pairs: Iterable[tuple[int, int]]) -> list[Json]:
    """For each pair (row of an image, row of a caption) of the split: image, shard, text, words, grid, boxes and weights.

    boxes (R,4): x1 y1 x2 y2 of the regions or patches in units of the image; grid: whether they are patches; weights: a row of R numbers
    for each word, 4 digits. Nothing for matchers that do not attend, and for images whose parts have no known place.
    """
    found = []
    for image, caption in pairs:
        if (weights := _weights(matcher, split, image, caption)) is None:
            return []
        boxes = _boxes(matcher.inputs.image, split, image, weights.shape[1])
        text = split.names.texts[caption]
        words = [(place, word) for place, word in enumerate(spelled(matcher.inputs.tokenizer, text)) if word][:WORDS]
        if boxes is None or not words or words[-1][0] >= len(weights):
            continue
        rows = [[round(value, 4) for value in weights[place].tolist()] for place, _ in words]
        about = {"image": split.names.image_keys[image], "shard": split.names.image_shards[image], "text": text}
        grid = matcher.inputs.image.kind != "regions"
        found.append({**about, "words": [word for _, word in words], "grid": grid, "boxes": boxes, "weights": rows})
    return found


def spelled(tokenizer: Any, text: str) -> list[str]:
    """The word, or piece of one, behind each token of a caption; '' for start, end and padding."""
    ids = tokenizer([text])[0][0].tolist()
    if (hf := getattr(tokenizer, "hf", None)) is not None:
        special = set(hf.all_special_ids)
        return ["" if token in special else hf.decode([token]).strip() for token in ids]
    names = {number: word for word, number in tokenizer.word2idx.items()}
    return ["" if token < 3 else names[token] for token in ids]  # pad, start, end


def _weights(matcher: Matcher, split: EncodedSplit, image: int, caption: int) -> torch.Tensor | None:
    """(L,R) of what is there: padding is left out. None for a matcher that does not attend."""
    if split.images.parts is None or split.captions.parts is None:
        return None
    device = next(matcher.parameters()).device
    one, other = split.images[image : image + 1], split.captions[caption : caption + 1]
    with torch.inference_mode():
        try:
            found = matcher.attention(one.to(device), other.to(device))
        except NotImplementedError:
            return None
    if found is None:
        return None
    regions = slice(None) if one.mask is None else one.mask[0]
    words = slice(None) if other.mask is None else other.mask[0]
    return found[0].float().cpu()[words][:, regions]


def _boxes(form: Any, split: EncodedSplit, image: int, parts: int) -> list[list[float]] | None:
    """Where the parts of an image lie in it; None where nobody knows."""
    shard, key = split.names.image_shards[image], split.names.image_keys[image]
    entry = next((entry for entry in index_shard(shard) if key in (entry.key, full_key(shard, entry.key))), None)
    return None if entry is None else places(form, read_range(shard, entry.start, entry.end), parts)


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
