"""Which images a question wants: filters on the columns of an index.

    {"split": ["test"]}                 one of the values
    {"key": ["2024/*"]}                 a value that ends in * is a beginning
    {"width": ["640..1920", "4000.."]}  of numbers, a range with both ends, or open at one

Columns are combined by and, the values of one by or.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor

pc: Any = pyarrow.compute  # its functions are made as it is imported, so no type checker knows them


def chosen(columns: Mapping[str, Any], where: Mapping[str, Sequence[str]]) -> Tensor:
    """(I,) bool: the rows that pass. Raises ValueError for a column that is not there, naming those that are, and for a bad range."""
    passed: Any = None
    for name, values in where.items():
        if name not in columns:
            raise ValueError(f"the index has no column {name!r} to filter by; it has {', '.join(sorted(columns))}")
        wanted = [values] if isinstance(values, str) else [str(value) for value in values]
        if not wanted:
            raise ValueError(f"the filter {name!r} names no value")
        found = _any_of(name, columns[name], wanted)
        passed = found if passed is None else pc.and_(passed, found)
    mask = passed.combine_chunks() if isinstance(passed, pa.ChunkedArray) else passed
    return torch.from_numpy(pc.fill_null(mask, False).to_numpy(zero_copy_only=False).copy())


def _any_of(name: str, column: Any, wanted: Sequence[str]) -> Any:
    numeric = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    tests = [_within(name, column, value) if numeric else _like(column, value) for value in wanted]
    found = tests[0]
    for test in tests[1:]:
        found = pc.or_(found, test)
    return found


def _like(column: Any, value: str) -> Any:
    texts = column if pa.types.is_string(column.type) else pc.cast(column, pa.string())
    return pc.starts_with(texts, value[:-1]) if value.endswith("*") else pc.equal(texts, value)


def _within(name: str, column: Any, value: str) -> Any:
    low, dots, high = value.partition("..")
    try:
        ends = [float(end) if end else None for end in ((low, high) if dots else (low, low))]
    except ValueError:
        raise ValueError(f"the column {name!r} holds numbers: filter it by a number or a range such as 10..20, not {value!r}") from None
    if ends == [None, None]:
        raise ValueError(f"the filter {name}={value!r} has no end: say 10..20, 10.. or ..20")
    tests = [compare(column, end) for compare, end in ((pc.greater_equal, ends[0]), (pc.less_equal, ends[1])) if end is not None]
    return tests[0] if len(tests) == 1 else pc.and_(*tests)
