"""Tables of image paths and captions: CSV, TSV, or any other delimiter."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import Literal, TypedDict, Unpack, get_args

from itm.data.formats import Json
from itm.data.records import Caption
from itm.data.sources.source import ListedImages, group_by_path, paths_by_split, read_text

csv.field_size_limit(1 << 30)  # a longer caption than the default is read, and then quarantined

_Row = tuple[str, list[Caption], Json]
BadRows = Literal["refuse", "quarantine"]
COPY = re.compile(r"(?:(?<=\.\w{3})|(?<=\.\w{4}))#\d+$")
"""What Flickr8k.token.txt writes behind the name of an image: `1000268201.jpg#0` is its first caption."""


class More(TypedDict, total=False):
    """Options of a table that is not as most are."""

    columns: list[str]
    bad_rows: BadRows


class CsvPairs(ListedImages):
    """One row a caption (repeated paths are the same image), or several caption columns a row.

    `path`: a file name with `{split}`, a mapping split: file, or one file, all train unless `split_column` says more.
    `delimiter`: default a tab for .tsv and a comma otherwise. `quoting`: whether `"` begins a quoted cell; default no between tabs, where
    it is a character like any other, and yes otherwise. `columns`: the names of the columns, for a file without a header line.
    `bad_rows`: what a line is that names no image or whose quoted cell does not end: `refuse` the file, or `quarantine` the row.
    A row is a line: where captions hold the delimiter unquoted, and the only caption
    column is the last one, the rest of the line is the caption. A caption that cannot be told (a short row, cells too many) is
    quarantined with its line. Raises ValueError naming the columns there are, and the line where a quoted cell does not end.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        image_root: str = ".",
        image_column: str = "image",
        caption_columns: list[str] | str = "caption",
        split_column: str | None = None,
        delimiter: str | None = None,
        quoting: bool | None = None,
        **more: Unpack[More],
    ) -> None:
        captions = [caption_columns] if isinstance(caption_columns, str) else list(caption_columns)
        self.image, self.captions, self.split, self.delimiter = image_column, captions, split_column, delimiter
        self.quoting, self.columns, self.bad_rows = quoting, more.get("columns"), more.get("bad_rows", "refuse")
        if self.bad_rows not in get_args(BadRows):
            raise ValueError(f"bad_rows is one of {', '.join(get_args(BadRows))}, not {self.bad_rows!r}")
        self.quotes_are_text = False
        paths = paths_by_split(path)
        rows: dict[str, list[_Row]] = {}
        for split, file in paths.items():
            for chosen, row in self._rows(file, split):
                rows.setdefault(chosen, []).append(row)
        super().__init__(image_root, {split: group_by_path(r) for split, r in rows.items()}, paths.values())

    def identity(self) -> Json:
        columns: Json = {"image": self.image, "captions": self.captions, "split": self.split, "delimiter": self.delimiter}
        if self.columns:
            columns["named"] = self.columns
        if self.bad_rows != "refuse":
            columns["bad_rows"] = self.bad_rows
        if self.quotes_are_text:  # where there is no quote, quoting changes nothing
            columns["quotes"] = "text"
        return super().identity() | {"columns": columns}

    def _rows(self, path: str, split: str) -> Iterator[tuple[str, _Row]]:
        lines = [line.removesuffix("\r").replace("\r", " ") for line in read_text(path).split("\n")]
        if stated := excel_delimiter(lines[0]):
            lines[0] = ""
        delimiter = self.delimiter or stated or ("\t" if path.endswith(".tsv") else ",")
        quoted = delimiter != "\t" if self.quoting is None else self.quoting
        self.quotes_are_text |= not quoted and any('"' in line for line in lines)
        found = [(n, cells) for n, line in enumerate(lines, 1) if (cells := self._cells(path, n, line, delimiter, quoted))] or [(1, [])]
        header, rows = (self.columns, found) if self.columns else (found[0][1], found[1:])
        named = [name.strip() for name in header]
        wanted = [self.image, *self.captions, *([self.split] if self.split else [])]
        if missing := [name for name in wanted if name not in named]:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(named)} (set image_column, caption_columns)")
        for number, cells in rows:
            if len(cells) > len(named) and self.captions == named[-1:] and not (quoted and '"' in lines[number - 1]):
                cells = [cell.lstrip() for cell in lines[number - 1].split(delimiter, len(named) - 1)]
            said = dict(zip(named, cells, strict=False))
            torn = quoted and unended(lines[number - 1], delimiter)
            yield self._row(said, f"{path} line {number}", split, len(cells) - len(named), torn)

    def _cells(self, path: str, number: int, line: str, delimiter: str, quoted: bool) -> list[str]:
        """The cells of a line; of one whose quoted cell does not end those between its delimiters, where such rows are quarantined."""
        return _cells(path, number, line, delimiter, quoted and not (self.bad_rows == "quarantine" and unended(line, delimiter)))

    def _row(self, cells: dict[str, str], where: str, split: str, surplus: int, torn: bool) -> tuple[str, _Row]:
        """Its split and row. surplus: cells beyond the header's; below 0 the last columns have none. torn: a quote does not close."""
        image = COPY.sub("", cells.get(self.image, ""))
        if not image and self.bad_rows == "quarantine":
            image = f"line_{where.rpartition(' ')[2]}_names_no_image"  # no such file: it is listed as one that is missing
        if not image:
            raise ValueError(f"{where} names no image: its column {self.image} is empty")
        fault = None if surplus <= 0 else f"{where} has {surplus} cells more than the header: quote the caption, or use another delimiter"
        fault = f"{where}: a quoted cell does not end with the line" if torn else fault
        if self.split and not cells.get(self.split):
            fault = fault or f"{where} has no {self.split}"
        captions = []
        for name in self.captions:
            unread = fault or (None if name in cells else f"{where} has no {name}")
            captions.append(Caption("", "" if unread else cells[name], unread=unread))
        chosen = cells[self.split] if self.split and not fault else split  # cells that were shifted name no split
        return chosen, (image, captions, {})


def excel_delimiter(line: str) -> str | None:
    """The delimiter of a first line `sep=;`, which Excel reads and does not show."""
    found = re.fullmatch(r'"?sep=(.)"?', line.strip(" \r"), re.IGNORECASE)
    return found[1] if found else None


def unended(line: str, delimiter: str) -> bool:
    """Whether a quoted cell of the line does not end in it."""
    try:
        next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True), [])
    except csv.Error:
        return True
    return False


def _cells(path: str, number: int, line: str, delimiter: str, quoted: bool) -> list[str]:
    """The cells of one line. Raises ValueError naming it when a quoted cell does not end in it."""
    if not quoted:
        return [cell.lstrip() for cell in line.split(delimiter)] if line else []
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise ValueError(
            f"{path} line {number}: a quoted cell does not end with the line ({error}); put each row on one line, double the quotes "
            'inside a quoted cell, or set the option quoting=false where `"` is text'
        ) from None
