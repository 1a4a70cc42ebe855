"""Named columns <-> Arrow tables, for batches that cross a process border."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

Columns = dict[str, Any]
"""Name -> numpy array (N, ...), or a list of N strings or nulls."""


def to_table(columns: Mapping[str, object]) -> pa.Table:
    """A numpy array (N, ...) becomes one fixed-size list a row; lists and Arrow arrays stay as they are.

    The shape behind a list is not stored: whoever reads derives it, so no schema metadata has to survive a transport.
    """
    return pa.table({name: _fixed_lists(value) if isinstance(value, np.ndarray) else pa.array(value) for name, value in columns.items()})


def _fixed_lists(array: np.ndarray) -> pa.Array:
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    if array.ndim == 1:
        return pa.array(array)
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, math.prod(array.shape[1:]))


def to_columns(table: pa.Table) -> Columns:
    """Numbers as (N,) or (N, width) arrays, writable copies, since torch must own what it may write; all else as lists."""
    return {name: _cells(table.column(name)) for name in table.column_names}


def _cells(cells: pa.ChunkedArray) -> np.ndarray | list[object]:
    chunk = cells.chunk(0) if cells.num_chunks == 1 else cells.combine_chunks()
    if pa.types.is_fixed_size_list(chunk.type):
        return chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), -1).copy()
    return chunk.to_numpy().copy() if pa.types.is_primitive(chunk.type) and not chunk.null_count else chunk.to_pylist()
