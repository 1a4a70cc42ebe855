"""Image to image and text to text: for some queries of a split, what the matcher's own vectors hold nearest."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from itm.evaluation.dataset import Names
from itm.evaluation.protocols import Scored
from itm.evaluation.uni_modal import uni_vectors
from itm.types import Encoded

QUERIES, NEAREST = 6, 5
LABELS = ("scene", "scene_id", "label", "class")  # of an image's metadata, as the protocol i2i takes them


class Near(TypedDict):
    """A row that was found; holds: it has the query's label (image) or image (text), None where nobody knows."""

    row: int
    score: float
    holds: bool | None


class Query(TypedDict):
    """A row that was asked for, and its nearest others, the nearest first."""

    query: int
    hits: list[Near]


def neighbours(scored: Scored) -> dict[str, list[Query]]:
    """`i2i` and `t2t`: `QUERIES` evenly spread rows with their nearest others by cosine; nothing for a side without vectors."""
    sides = {"i2i": (scored.images, labels_of(scored.names)), "t2t": (scored.captions, scored.names.caption_image)}
    return {way: found for way, (rows, labels) in sides.items() if (found := _nearest(_vectors(rows), labels))}


def labels_of(names: Names) -> Tensor | None:
    """(I,) int64, equal for images of one label; None where an image has none."""
    for key in LABELS:
        values = [meta.get(key) for meta in names.image_metas]
        if values and None not in values:
            index = {value: row for row, value in enumerate(dict.fromkeys(map(str, values)))}
            return torch.tensor([index[str(value)] for value in values])
    return None


def _vectors(rows: Encoded | None) -> Tensor | None:
    """(N,U) unit rows; None for a matcher without."""
    try:
        return torch.nn.functional.normalize(uni_vectors(rows, "image or caption"), dim=1)
    except ValueError:
        return None


def _nearest(vectors: Tensor | None, labels: Tensor | None) -> list[Query]:
    if vectors is None or len(vectors) < 2:
        return []
    found: list[Query] = []
    for row in torch.linspace(0, len(vectors) - 1, min(QUERIES, len(vectors))).round().long().unique().tolist():
        scores = vectors @ vectors[row]
        scores[row] = -torch.inf
        best = scores.topk(min(NEAREST, len(vectors) - 1)).indices.tolist()
        found.append({"query": row, "hits": [{"row": n, "score": float(scores[n]), "holds": _same(labels, row, n)} for n in best]})
    return found


def _same(labels: Tensor | None, row: int, other: int) -> bool | None:
    return None if labels is None else bool(labels[row] == labels[other])
