"""Where a late-interaction matcher looks: for some captions and their images, how much each word looks at each region or patch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from itm.data.formats import Json
from itm.data.manifest import full_key
from itm.data.shards import index_shard, read_range
from itm.evaluation.attention import looks, places, spelled
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


def _weights(matcher: Matcher, split: EncodedSplit, image: int, caption: int) -> torch.Tensor | None:
    """(L,R) of what is there: padding is left out. None for a matcher that does not attend."""
    device = next(matcher.parameters()).device
    one, other = split.images[image : image + 1], split.captions[caption : caption + 1]
    return looks(matcher, one.to(device), other.to(device))


def _boxes(form: Any, split: EncodedSplit, image: int, parts: int) -> list[list[float]] | None:
    """Where the parts of an image lie in it; None where nobody knows."""
    shard, key = split.names.image_shards[image], split.names.image_keys[image]
    entry = next((entry for entry in index_shard(shard) if key in (entry.key, full_key(shard, entry.key))), None)
    return None if entry is None else places(form, read_range(shard, entry.start, entry.end), parts)
