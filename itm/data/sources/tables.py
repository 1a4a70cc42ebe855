"""Rows of a table whatever its format: JSON lines, CSV, TSV or Parquet. Each row knows its place in the file."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from itm.data import files
from itm.data.formats import Json


@dataclass(frozen=True)
class Row:
    """where: file and row or line. fault: why its cells cannot be told from one another, or None."""

    where: str
    cells: Json
    fault: str | None = None


def read_rows(uri: str, name: str, data: bytes) -> Iterator[Row]:
    """The rows of the file `name` (whose suffix says the format) at `uri`, which messages name.

    Raises ValueError naming the file, and the line, where it cannot be read as what its suffix says.
    """
    suffix = name.lower().rpartition(".")[2]
    if suffix == "parquet":
        try:
            rows = pq.read_table(pa.BufferReader(data)).to_pylist()
        except pa.ArrowException as error:
            raise ValueError(f"{uri} is no Parquet file: {error}") from None
        yield from (Row(f"{uri} row {number}", row) for number, row in enumerate(rows))
        return
    lines = text_lines(uri, data)
    yield from _json_lines(uri, lines) if suffix == "jsonl" else _cells(uri, lines, "\t" if suffix == "tsv" else ",")


def text_lines(uri: str, data: bytes) -> list[str]:
    """The lines of a text in UTF-8, without line ends. Raises ValueError naming file and line for another encoding."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{uri} line {line} is not UTF-8 ({error.reason}): save the file as UTF-8") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]  # U+2028 and its like are part of a text


def _json_lines(uri: str, lines: list[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{uri} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is a {type(row).__name__}, not an object")
        yield Row(where, row)


def _cells(uri: str, lines: list[str], delimiter: str) -> Iterator[Row]:
    header: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        where = f"{uri} line {number}"
        try:
            cells = line.split(delimiter) if delimiter == "\t" else next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise ValueError(f"{where}: a quoted cell does not end with the line ({error}); metadata.jsonl holds such captions") from None
        if not header:
            header = [cell.strip() for cell in cells]
            continue
        surplus = len(cells) - len(header)
        fault = f"{where} has {surplus} cells more than the header: quote the caption" if surplus > 0 else None
        yield Row(where, dict(zip(header, cells, strict=False)), fault)


def normal(name: str) -> str:
    """A file name as names are compared: NFC, without `./` in front."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def read_table_file(uri: str) -> Iterator[Row]:
    """As `read_rows`, of a file on any file system. Raises ValueError as well when there is none."""
    try:
        data = files.read_bytes(uri)
    except OSError as error:
        raise ValueError(f"{uri} cannot be read: {error.strerror or error}") from None
    yield from read_rows(uri, uri, data)
