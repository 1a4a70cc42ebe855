"""Tables that hold images or their paths, with captions: Parquet, Arrow, and data sets that Hugging Face's `datasets` saved."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from itm.data import files
from itm.data.formats import Json
from itm.data.records import Problem, Record, image_format
from itm.data.sources.arrow_tables import ArrowTable, find_tables, open_table
from itm.data.sources.folder import caption_columns_of, captions_of
from itm.data.sources.pictures import image_fault
from itm.data.sources.source import Source, below, read_file, unique_keys
from itm.data.sources.tables import Row

IDS = ("image_id", "img_id", "imgid", "cocoid")
"""What a column that names the image of a row is called where nobody says."""
_TAIL = 1 << 16


class Parquet(Source):
    """`path`: a file, a glob, a folder, a list of these, or a mapping split: these, with `{split}` where one pattern names all splits; a
    folder that `datasets.save_to_disk` wrote. Elsewhere splits are told by the names of files and folders (`validation-00000-of-...`).

    `image_column`: a struct of `bytes` and `path`, bytes, or a path below `image_root`; unset = `image`, else the one column that is such
    a struct. `caption_columns` as in `imagefolder`. `group_by`: rows with one value there are captions of one image: a column, `bytes` of
    the image, or `row` where each row is an image; unset = a column called image_id, img_id, imgid or cocoid, the path, or else the
    bytes, and `row` where a row has a list of captions or several columns.
    Raises ValueError naming the file and its columns.
    """

    def __init__(
        self,
        path: str | list[str] | dict[str, Any],
        image_column: str | None = None,
        caption_columns: list[str] | str | None = None,
        group_by: str | None = None,
        image_root: str = ".",
    ) -> None:
        found = find_tables(path)
        uris = [uri for held in found.values() for uri in held]
        self.splits = list(found)
        self._files = {split: [uris.index(uri) for uri in held] for split, held in found.items()}
        schema = open_table(uris[0]).schema
        image = image_column or _image_column(schema, uris[0])
        chosen = [caption_columns] if isinstance(caption_columns, str) else caption_columns
        captions = caption_columns_of(chosen, schema.names, uris[0])
        self.group_by = group_by or _usual_groups(schema, image, captions)
        own = [] if self.group_by in ("row", "bytes") else [self.group_by]
        self.tables = _Tables(uris, image, captions, own, files.absolute(image_root))
        self.tables.table(0)
        self._grouped = lru_cache(maxsize=None)(self._group)

    def count(self, split: str) -> int:
        return len(self._grouped(split).begins) - 1

    def identity(self) -> Json:
        """Files are known by name, size and their last 64 KB, which hold the sizes and statistics of all row groups of a Parquet file."""
        tables, digests = self.tables, []
        for uri in tables.uris:
            size = files.size_of(uri)
            tail = files.read_span(uri, max(0, size - _TAIL), size)
            digests.append([files.name_of(uri), hashlib.sha256(str(size).encode() + tail).hexdigest()])
        columns = {"image": tables.image, "captions": tables.captions, "group_by": self.group_by}
        return {"source": "Parquet", "files": digests, "splits": self._files, "columns": columns}

    def uncaptioned(self, split: str) -> bool:
        return not self.tables.captions

    def places(self, split: str, start: int, stop: int) -> list[Any]:
        groups = self._grouped(split)
        return [groups.place(item) for item in range(start, stop)]

    def item(self, split: str, index: int) -> Record | Problem:
        return next(self.at(split, self.places(split, index, index + 1)))

    def at(self, split: str, places: list[Any]) -> Iterator[Record | Problem]:
        """Each row group is read once, whatever the order of the rows; of the other rows of an image only the captions are kept."""
        first = {tuple(place[0]) for place in places}
        rows: dict[tuple[int, int], Row] = {}
        for number in sorted({file for place in places for file, _ in place}):
            wanted = sorted({row for place in places for file, row in place if file == number})
            for at, row in self.tables.rows(number, wanted):
                said = {name: value for name, value in row.cells.items() if name in self.tables.captions}
                rows[number, at] = row if (number, at) in first else replace(row, cells=said)
        for place in places:
            yield self._record(split, place, [rows.pop((file, row)) for file, row in place])

    def abouts(self, split: str) -> Iterator[Json]:
        known: dict[int, list[Json]] = {number: list(self.tables.abouts(number)) for number in self._files[split]}
        groups = self._grouped(split)
        for item in range(self.count(split)):
            number, row = groups.place(item)[0]
            yield {"key": self.tables.key(number, row), **known[number][row]}

    def _record(self, split: str, place: list[list[int]], rows: list[Row]) -> Record | Problem:
        key, row = self.tables.key(*place[0]), rows[0]
        captions = [caption for one in rows for caption in captions_of(one, self.tables.captions)]
        fault, image, filename = row.fault, b"", None
        if not fault:
            said = row.cells[self.tables.image]
            filename = _path_of(said)
            try:
                image = self.tables.image_bytes(said)
                if wrong := image_fault(image):
                    fault = f"{row.where}: the image {f'{filename} ' if filename else ''}{wrong}"
            except ValueError as error:
                fault = f"{row.where}: {error}"
        if fault:
            return Problem(key, "", "source", fault, captions=len(captions))
        meta = {"image_id": key, **({"filename": filename} if filename else {}), **_scalars(row.cells, self.tables.captions)}
        return Record(
            key, split, [replace(c, id=f"{key}#{n}") for n, c in enumerate(captions)], image, image_format(image) or "", meta=meta
        )

    def _group(self, split: str) -> _Groups:
        """One pass over the column that tells images apart, at most; the driver makes it, and no worker."""
        numbers = self._files[split]
        starts = np.concatenate([[0], np.cumsum([self.tables.table(number).rows for number in numbers])]).astype(np.int64)
        if self.group_by == "row":
            return _Groups(np.arange(starts[-1]), np.arange(starts[-1] + 1), numbers, starts[:-1])
        column = self.tables.image if self.group_by == "bytes" else self.group_by
        marks = pa.chunked_array([pa.array(self.tables.marks(number, column), pa.binary()) for number in numbers])
        codes = marks.combine_chunks().dictionary_encode().indices.to_numpy()
        begins = np.concatenate([[0], np.cumsum(np.bincount(codes))]).astype(np.int64)
        return _Groups(np.argsort(codes, kind="stable"), begins, numbers, starts[:-1])


@dataclass(frozen=True)
class _Groups:
    """Item k of a split has rows order[begins[k]:begins[k + 1]], numbered over its files, which begin at `starts`."""

    order: np.ndarray
    begins: np.ndarray
    files: list[int]
    starts: np.ndarray

    def place(self, item: int) -> list[list[int]]:
        """[number of the file, row in it] of each row of an item."""
        rows = self.order[self.begins[item] : self.begins[item + 1]]
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        return [[self.files[n], int(row - self.starts[n])] for n, row in zip(numbers.tolist(), rows, strict=True)]


class _Tables:
    """The files, opened when they are needed; rows by number of the file and row in it."""

    def __init__(self, uris: list[str], image: str, captions: list[str], own: list[str], image_root: str) -> None:
        """own: other columns that every file must have."""
        self.uris, self.image, self.captions, self.image_root = uris, image, captions, image_root
        self.wanted = [image, *captions, *own]
        self.file_keys = unique_keys([files.join(*uri.rsplit("/", 2)[-2:]) for uri in uris])
        self._open = lru_cache(8)(open_table)

    def key(self, number: int, row: int) -> str:
        return f"{self.file_keys[number]}-{row:06d}"

    def table(self, number: int) -> ArrowTable:
        """Raises ValueError naming the columns it lacks and those it has."""
        table, uri = self._open(self.uris[number]), self.uris[number]
        if missing := [name for name in self.wanted if name not in table.schema.names]:
            there = ", ".join(table.schema.names)
            raise ValueError(f"{uri} has no column {', '.join(missing)}; it has {there} (set image_column, caption_columns, group_by)")
        return table

    def rows(self, number: int, wanted: list[int]) -> Iterator[tuple[int, Row]]:
        """The wanted rows of a file, in order; what lies in a row group that cannot be read is a row with that fault."""
        uri, table, start = self.uris[number], self.table(number), 0
        columns = [*_plain_columns(table.schema, {self.image, *self.captions}), self.image, *self.captions]
        for group, size in enumerate(table.groups):
            inside = [row for row in wanted if start <= row < start + size]
            done = 0
            try:
                for at, cells in _cells(table, group, columns, [row - start for row in inside]):
                    yield start + at, Row(f"{uri} row {start + at}", cells)
                    done += 1
            except (pa.ArrowException, OSError) as error:
                reason = f"{uri}: row group {group} cannot be read: {str(error).splitlines()[0]}"
                yield from ((at, Row(f"{uri} row {at}", {}, reason)) for at in inside[done:])
            start += size

    def abouts(self, number: int) -> Iterator[Json]:
        """Of each row its plain cells, and the path of its image; no image is read."""
        table = self.table(number)
        kind = table.schema.field(self.image).type
        path = f"{self.image}.path" if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 else None
        path = self.image if _is_text(kind) else path
        columns = _plain_columns(table.schema, {self.image, *self.captions}) + ([path] if path else [])
        for group, size in enumerate(table.groups):
            for _, cells in (
                _cells(table, group, columns, range(size), without_bytes=self.image) if columns else ((n, {}) for n in range(size))
            ):
                name = _path_of(cells.pop(self.image, None))
                yield {**_scalars(cells, ()), **({"filename": name} if name else {})}

    def marks(self, number: int, column: str) -> Iterator[bytes]:
        """What tells the image of each row from others; an empty cell is like no other."""
        table, row = self.table(number), 0
        for group, size in enumerate(table.groups):
            done = 0
            try:
                for at, cells in _cells(table, group, [column], range(size)):
                    yield self._mark(cells[column], column == self.image) or f"{number} {row + at}".encode()
                    done += 1
            except (pa.ArrowException, OSError):  # `rows` says why
                yield from (f"{number} {row + n}".encode() for n in range(done, size))
            row += size

    def _mark(self, said: Any, image: bool) -> bytes | None:
        data = said.get("bytes") if isinstance(said, dict) else said
        data = _path_of(said) if data is None and image else data
        if data is None:
            return None
        return hashlib.blake2b(data if isinstance(data, bytes) else repr(data).encode(), digest_size=16).digest()

    def image_bytes(self, said: Any) -> bytes:
        """The bytes of an image cell. Raises ValueError saying why there are none."""
        data = said.get("bytes") if isinstance(said, dict) else said
        if isinstance(data, bytes):
            return data
        path = _path_of(said)
        if not path:
            raise ValueError("the image is null")
        return read_file(below(self.image_root, path))


def _cells(table: ArrowTable, group: int, columns: list[str], rows: Any, without_bytes: str | None = None) -> Iterator[tuple[int, Json]]:
    """(row in the group, its cells) of the rows asked for, which ascend. without_bytes: a struct of which only the path is taken."""
    left = iter(rows)
    row, begin = next(left, None), 0
    if row is None:
        return
    for piece in table.pieces(group, list(dict.fromkeys(columns))):
        while row is not None and row < begin + piece.num_rows:
            cells = {}
            for name, column in zip(piece.schema.names, piece.columns, strict=True):
                at = column.field("path") if name == without_bytes and pa.types.is_struct(column.type) else column
                cells[name] = at[row - begin].as_py()
            yield row, cells
            row = next(left, None)
        begin += piece.num_rows
        if row is None:
            return


def _plain_columns(schema: pa.Schema, but: Container[str]) -> list[str]:
    """The columns of single texts and numbers, which are kept with an image."""
    plain = lambda kind: _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return [field.name for field in schema if field.name not in but and plain(field.type)]


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_image(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _image_column(schema: pa.Schema, uri: str) -> str:
    structs = [field.name for field in schema if _is_image(field.type)]
    if "image" in schema.names or len(structs) == 1:
        return "image" if "image" in schema.names else str(structs[0])
    said = f"more than one column of images, {', '.join(structs)}" if structs else "no column image"
    raise ValueError(f"{uri} has {said}; it has {', '.join(schema.names)}: set image_column")


def _usual_groups(schema: pa.Schema, image: str, captions: list[str]) -> str:
    if len(captions) != 1 or image not in schema.names or pa.types.is_nested(schema.field(captions[0]).type):
        return "row"
    if ids := [name for name in IDS if name in schema.names]:
        return ids[0]
    return image if _is_text(schema.field(image).type) else "bytes"


def _path_of(said: Any) -> str | None:
    path = said.get("path") if isinstance(said, dict) else said
    return path if isinstance(path, str) and path else None


def _scalars(cells: Json, but: Container[str]) -> Json:
    """What of a row can be kept as JSON beside its image."""
    plain = {n: v for n, v in cells.items() if n not in but and isinstance(v, str | int | float | bool)}
    return {n: v for n, v in plain.items() if not isinstance(v, float) or math.isfinite(v)}
