"""Rows -> Batch: the only border between Arrow and torch. `to_table` packs prepared rows, `to_batch` unpacks them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from itm.data.preprocess import as_images
from itm.types import Batch, Captions, SoftLabels

IMAGE_COLUMNS = ("pixels", "regions", "boxes", "mask")


def to_table(columns: dict[str, Any]) -> pa.Table:
    """Named columns of equal length -> Arrow. A numpy array (N, ...) becomes one fixed-size list a row; lists stay as they are.

    The shape behind a list is not stored: `to_batch` derives it, so no schema metadata has to survive a transport.
    """
    return pa.table({name: _fixed_lists(value) if isinstance(value, np.ndarray) else pa.array(value) for name, value in columns.items()})


def _fixed_lists(array: np.ndarray) -> pa.Array:
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    if array.ndim == 1:
        return pa.array(array)
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, math.prod(array.shape[1:]))


def column(table: pa.Table, name: str) -> np.ndarray:
    """(N,) or (N, width) numpy array of a column; a writable copy, since torch must own what it may write."""
    cells = table.column(name)
    chunk = cells.chunk(0) if cells.num_chunks == 1 else cells.combine_chunks()
    if pa.types.is_fixed_size_list(chunk.type):
        return chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), -1).copy()
    return chunk.to_numpy(zero_copy_only=False).copy()


def to_batch(table: pa.Table) -> Batch:
    """Table of `to_table` with columns image_id, pixels | regions + boxes + mask, tokens, token_mask, [teacher_image, teacher_text]."""
    names = set(table.column_names)
    image = {name: column(table, name) for name in IMAGE_COLUMNS if name in names}
    rows, ids = len(table), column(table, "image_id")
    if "pixels" in image:
        side = math.isqrt(image["pixels"].shape[1] // 3)
        image["pixels"] = image["pixels"].reshape(rows, side, side, 3)
    else:
        regions = image["mask"].shape[1]
        image = {"mask": image["mask"].astype(bool)} | {name: image[name].reshape(rows, regions, -1) for name in ("regions", "boxes")}
    mask = column(table, "token_mask").astype(bool)
    longest = int(mask.sum(1).max())  # rows come padded to the tokenizer's max_length, so that all tables share a schema
    tokens = torch.from_numpy(column(table, "tokens")[:, :longest].copy())
    captions = Captions(tokens, torch.from_numpy(mask[:, :longest].copy()), torch.from_numpy(ids))
    teacher = {name: torch.from_numpy(column(table, f"teacher_{name}")) for name in ("image", "text") if f"teacher_{name}" in names}
    return Batch(as_images(image, ids), captions, SoftLabels(**teacher) if teacher else None)
