"""A side of an index as it lies in its files: rows become float32 when they are read.

N = rows   K = parts   D = width
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast, overload

import pyarrow as pa
import torch
from torch import Tensor

from itm.matchers.mean import beside
from itm.retrieval.sides import FIELDS
from itm.types import Encoded

CACHED = 1 << 18
"""Numbers of float32 that the second cache of a core holds beside the codes that they come from."""


class Cells(Sequence[Any]):
    """A column as a sequence of Python values, which are made as they are asked for."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, row: int) -> Any: ...
    @overload
    def __getitem__(self, row: slice) -> list[Any]: ...
    def __getitem__(self, row: int | slice) -> Any:
        return self.column[row].to_pylist() if isinstance(row, slice) else self.column[row].as_py()

    def __iter__(self) -> Iterator[Any]:
        return (cell for chunk in self.column.chunks for cell in chunk.to_pylist())


class Stored:
    """The rows of several files behind one another, none of which is empty of columns; not copied where they are memory-mapped."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self.tables = [table for table in tables if len(table)]
        self._threads = threading.local()
        self.starts = torch.tensor([0, *(len(table) for table in self.tables)]).cumsum(0)
        names = self.tables[0].column_names if self.tables else []
        self.members = sorted({name.partition(".")[0] for name in names if name[0].isdigit()})
        self.fields = frozenset(name.rpartition(".")[2] for name in names) & frozenset(FIELDS)
        prefixes = [f"{member}." for member in self.members] or [""]
        self.vectors = {p + f: [_fixed(t, p + f) for t in self.tables] for p in prefixes for f in ("vector", "uni") if p + f in names}
        self.lists = {p + f: [_ragged(t[p + f]) for t in self.tables] for p in prefixes for f in ("parts", "mask") if p + f in names}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, rows: slice | Tensor, only: Sequence[str] = FIELDS, brief: bool = False) -> Encoded:
        """float32 rows; parts and mask padded to the longest row."""
        pieces = list(self._pieces(rows))
        if not self.members:
            return self._one("", pieces, rows, only, brief)
        return beside([self._one(f"{member}.", pieces, rows, only, brief) for member in self.members])

    def pieces(self, rows: slice) -> Iterator[Encoded]:
        """See `Side`."""
        if self.members or self.lists:
            yield self.read(rows, brief=True)
            return
        step = max(1, CACHED // max(held[0][0].shape[1] for held in self.vectors.values()))
        for number, own, _ in self._pieces(rows):
            assert isinstance(own, slice)
            for first in range(own.start, own.stop, step):
                last = min(first + step, own.stop)
                read: dict[str, Any] = {field: self._converted(field, *held[number], first, last) for field, held in self.vectors.items()}
                yield Encoded(**read)

    def _converted(self, field: str, codes: Tensor, scale: Tensor | None, first: int, last: int) -> Tensor:
        out = self._scratch(field, last - first, codes.shape[1]).copy_(codes[first:last])
        return out if scale is None else out.mul_(scale[first:last, None])

    def _scratch(self, name: str, rows: int, width: int) -> Tensor:
        """Memory of this thread that brief reads share."""
        held: dict[str, Tensor] = self._threads.__dict__.setdefault("held", {})
        kept = held.get(name)
        if kept is None or kept.shape[0] < rows:
            kept = held[name] = torch.empty(rows, width)
        return kept if kept.shape[0] == rows else kept[:rows]

    def _pieces(self, rows: slice | Tensor) -> Iterator[tuple[int, slice | Tensor, slice | Tensor]]:
        """(table, its rows, their places in what is read)."""
        if isinstance(rows, slice):
            for number, (start, end) in enumerate(zip(self.starts.tolist(), self.starts[1:].tolist(), strict=False)):
                first, last = max(rows.start, start), min(rows.stop, end)
                if first < last:
                    yield number, slice(first - start, last - start), slice(first - rows.start, last - rows.start)
            return
        table = torch.searchsorted(self.starts, rows, right=True) - 1
        for number in table.unique().tolist():
            places = (table == number).nonzero()[:, 0]
            yield number, rows[places] - self.starts[number], places

    def _one(self, prefix: str, pieces: Any, rows: slice | Tensor, only: Sequence[str], brief: bool) -> Encoded:
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        found: dict[str, Tensor] = {}
        for field in ("vector", "uni"):
            if field in only and (held := self.vectors.get(prefix + field)):
                shape = count, held[0][0].shape[1]
                out = self._scratch(prefix + field, *shape) if brief else torch.empty(shape)
                for number, own, places in pieces:
                    codes, scale = held[number]
                    if isinstance(places, slice):
                        out[places].copy_(codes[own])  # converted on its way
                    else:
                        out[places] = codes[own].float()
                    if scale is not None:
                        out[places] *= scale[own, None]
                found[field] = out
        for field in ("parts", "mask"):
            if field in only and (lists := self.lists.get(prefix + field)):
                found[field] = _padded(lists, pieces, count, field)
        return Encoded(**cast(Any, found))


def _padded(lists: Sequence[tuple[Tensor, Tensor]], pieces: Any, count: int, field: str) -> Tensor:
    if len(pieces) == 1 and isinstance(own := pieces[0][1], slice):
        values, offsets = lists[pieces[0][0]]
        starts = offsets[own.start : own.stop + 1]
        if bool((starts.diff() == starts[1] - starts[0]).all()):  # as many regions in each image: no row has to be padded
            block = values[int(starts[0]) : int(starts[-1])].unflatten(0, (count, -1))
            return block.bool() if field == "mask" else block.to(torch.float32, copy=True)
    ragged: list[Tensor] = [torch.empty(0)] * count
    for number, own, places in pieces:
        values, offsets = lists[number]
        numbers = range(own.start, own.stop) if isinstance(own, slice) else own.tolist()
        targets = range(places.start, places.stop) if isinstance(places, slice) else places.tolist()
        for row, place in zip(numbers, targets, strict=True):
            ragged[place] = values[int(offsets[row]) : int(offsets[row + 1])]
    padded = torch.nn.utils.rnn.pad_sequence(ragged, batch_first=True)
    return padded.bool() if field == "mask" else padded.float()


def _fixed(table: pa.Table, name: str) -> tuple[Tensor, Tensor | None]:
    column = table[name].combine_chunks() if table[name].num_chunks != 1 else table[name].chunk(0)
    scale = table[f"{name}.scale"].combine_chunks() if f"{name}.scale" in table.column_names else None
    return _view(column.flatten()).view(len(column), -1), None if scale is None else _view(scale)


def _ragged(column: pa.ChunkedArray) -> tuple[Tensor, Tensor]:
    """Values (sum of lengths, ...) and offsets (N+1,)."""
    chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    values = chunk.values
    inner = _view(values.flatten()).view(len(values), -1) if pa.types.is_fixed_size_list(values.type) else _view(values)
    return inner, _view(chunk.offsets)


def _view(array: pa.Array) -> Tensor:
    """The memory of an Arrow array as a tensor, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writ")
        return torch.from_numpy(array.to_numpy(zero_copy_only=True))
