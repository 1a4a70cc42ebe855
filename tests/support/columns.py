"""Comparing batches of columns."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from itm.data.arrow import Columns, to_table


def equal(columns: Columns, table: pa.Table) -> bool:
    """Equal batches; across processes arrays arrive flat, and truth values as bytes."""
    shaped = {n: v.reshape(len(v), -1) if isinstance(v, np.ndarray) and v.ndim > 1 else v for n, v in columns.items()}
    return bool(to_table(shaped).equals(table))
