"""Prepared columns -> Batch: the only border between the data plane and torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch

from itm.data.arrow import to_columns
from itm.data.preprocess import as_images
from itm.types import Batch, Captions, SoftLabels

IMAGE_COLUMNS = ("pixels", "regions", "boxes", "mask")


def to_batch(columns: pa.Table | Mapping[str, np.ndarray]) -> Batch:
    """Columns image_id, pixels | regions + boxes + mask, tokens, token_mask, [teacher_image, teacher_text] -> Batch.

    Arrays are taken over without a copy; those of a table are copied.
    """
    if isinstance(columns, pa.Table):
        columns = to_columns(columns)
    image = {name: columns[name] for name in IMAGE_COLUMNS if name in columns}
    ids = columns["image_id"]
    rows = len(ids)
    if "pixels" in image:
        side = math.isqrt(image["pixels"][0].size // 3)
        image["pixels"] = image["pixels"].reshape(rows, side, side, 3)
    else:
        regions = image["mask"].shape[1]
        image = {"mask": image["mask"].astype(bool)} | {name: image[name].reshape(rows, regions, -1) for name in ("regions", "boxes")}
    mask = columns["token_mask"].astype(bool)
    longest = int(mask.sum(1).max())  # rows come padded to the tokenizer's max_length, so that all tables share a schema
    tokens = torch.from_numpy(columns["tokens"][:, :longest].copy())
    captions = Captions(tokens, torch.from_numpy(mask[:, :longest].copy()), torch.from_numpy(ids))
    teacher = {name: torch.from_numpy(columns[f"teacher_{name}"]) for name in ("image", "text") if f"teacher_{name}" in columns}
    return Batch(as_images(image, ids), captions, SoftLabels(each=(), **teacher) if teacher else None)
