"""Tables of image paths and captions: their delimiter, header and columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from itm.config import Part
from itm.data.detect.finding import Answers, Finding, Question, choose, role_of, roles_of
from itm.data.detect.images import image_root, looks_like_image
from itm.data.sources.csv import COPY, excel_delimiter, unended
from itm.data.sources.source import refuse_other_files

DELIMITERS = {"\t": "tab", "|": "|", ",": ",", ";": ";"}
NAMED = {name: delimiter for delimiter, name in DELIMITERS.items()}
IMAGE_WORDS = ("image", "img", "photo", "picture", "file", "filename", "path")
CAPTION_WORDS = ("caption", "captions", "comment", "text", "sentence", "description", "title", "alt", "raw")
SPLIT_WORDS = ("split", "fold", "subset", "partition", "set")
READ = 400  # lines that are looked at


@dataclass(frozen=True)
class Table:
    """How a table is to be read. columns: names, given where the file has no header line."""

    delimiter: str
    header: bool
    columns: list[str]
    rows: list[list[str]]

    def cells(self, column: int) -> list[str]:
        return [row[column].strip() for row in self.rows if len(row) > column]


def read_lines(file: Path) -> list[str]:
    """The first lines. Raises ValueError naming a file that is not UTF-8."""
    with file.open("rb") as stream:
        data = stream.read(1 << 20)
    refuse_other_files(file, data)
    try:
        text = data.decode("utf-8-sig", errors="strict" if len(data) < 1 << 20 else "ignore")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text (byte {error.start}): convert it, e.g. iconv -f latin1 -t utf8") from None
    return [line for _, line in _rows_of(text)][:READ]


def _rows_of(text: str) -> list[tuple[int, str]]:
    """(number, line) of the lines that hold something. Excel's first line `sep=;` is none."""
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    return [(number, line) for number, line in lines if line.strip() and not (number == 1 and excel_delimiter(line))]


def is_table(file: Path) -> bool:
    """Whether most lines have two cells, one of which names an image file."""
    try:
        lines = read_lines(file)
    except ValueError:
        return file.suffix.lower() in (".csv", ".tsv")
    return any(_named_images(lines, delimiter) for delimiter in DELIMITERS)


def look_at_table(file: Path, start: Path, answers: Answers) -> Finding:
    """A finding of one table whose images lie in `start` or below."""
    table = read_table(file, answers)
    refuse_broken_lines(file, table)
    image, captions, split = columns_of(table, file, answers)
    names = table.columns
    root = image_root(list(dict.fromkeys(COPY.sub("", cell) for cell in table.cells(image) if cell)), start, answers, file.name)
    options: dict[str, object] = {"path": str(file), "image_root": root, "image_column": names[image]}
    options["caption_columns"] = names[captions[0]] if len(captions) == 1 else [names[n] for n in captions]
    if table.delimiter != ("\t" if file.suffix == ".tsv" else ","):
        options["delimiter"] = table.delimiter
    if not table.header:
        options["columns"] = names
    options |= (bad := _bad_rows(file, table, image))[0]
    roles: dict[str, str] = {}
    if split is not None:
        options["split_column"] = names[split]
        roles = roles_of(sorted(set(_all_cells(file, table, split))))
    header = f"header {', '.join(names)}" if table.header else f"no header, {len(names)} columns"
    layout = f"a table of images and captions, {file.name}: {DELIMITERS[table.delimiter]} between cells, {header}; images below {root}"
    return Finding(layout, Part(kind="csv", options=options), splits=roles, notes=bad[1])


def read_table(file: Path, answers: Answers) -> Table:
    """Delimiter, header and the first rows. Raises Question where two delimiters or a header that may be a row are possible."""
    lines = read_lines(file)
    if not lines:
        raise ValueError(f"{file} is empty")
    fits = {DELIMITERS[d]: f"then the first cells are {', '.join(_split(lines[0], d)[:3])}" for d in DELIMITERS if _named_images(lines, d)}
    if not fits:
        raise ValueError(f"{file}: no delimiter (tab, |, comma, ;) gives a column of image files; its first line is {lines[0][:80]!r}")
    delimiter = NAMED[choose(f"{file.name} can be cut into cells by more than one character", "delimiter", _likely(lines, fits), answers)]
    rows = [_split(line, delimiter) for line in lines]
    header = _has_header(file, rows, answers)
    width = len(rows[0]) if header else min(len(row) for row in rows)
    names = [name.strip() for name in rows[0]] if header else [f"column_{n + 1}" for n in range(width)]
    rows = [row for row in rows[header:] if any(cell.strip() for cell in row)]
    return Table(delimiter, header, names, rows)


def _likely(lines: list[str], fits: dict[str, str]) -> dict[str, str]:
    """Tabs and bars are not written in captions: where they give cells, a comma is one of a sentence."""
    for name in ("tab", "|"):
        if name in fits and all(NAMED[name] in line for line in lines):
            return {name: fits[name]}
    return fits


def _named_images(lines: Sequence[str], delimiter: str) -> bool:
    rows = [row for row in (_split(line, delimiter) for line in lines) if any(cell.strip() for cell in row)]
    wide = [row for row in rows if len(row) > 1]
    named = sum(any(looks_like_image(COPY.sub("", cell)) for cell in row) for row in wide)
    return len(wide) > 0 and len(wide) * 3 >= len(rows) and named * 2 >= len(wide)


def _split(line: str, delimiter: str) -> list[str]:
    if delimiter == "\t":
        return line.split("\t")
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


def _has_header(file: Path, rows: list[list[str]], answers: Answers) -> bool:
    """The first line is a header where it names no image although the others do."""
    if any(map(_names_image, rows[0])):
        found = {"no": "the first line is an image and its caption"}
        known = [cell for cell in rows[0] if cell.strip().lower() in (*IMAGE_WORDS, *CAPTION_WORDS)]
        if known:
            found["yes"] = f"the first line names columns: {', '.join(known)}"
        return choose(f"{file.name}: the first line may be a header or a row", "header", found, answers) == "yes"
    return answers.get("header", "yes") == "yes"


def columns_of(table: Table, file: Path, answers: Answers) -> tuple[int, list[int], int | None]:
    """Numbers of the image column, the caption columns and the split column. Raises Question where two columns may be meant."""
    number = {name: n for n, name in enumerate(table.columns)}
    images = {name: f"e.g. {table.cells(n)[0]}" for name, n in number.items() if _share(table.cells(n), _names_image) > 0.5}
    if not images:
        raise ValueError(f"{file}: no column names an image file in most rows; it has {', '.join(table.columns)}")
    image = number[choose(f"{file.name}: more than one column names images", "image-column", images, answers)]
    split = next((n for name, n in number.items() if n != image and _is_split(name, table.cells(n))), None)
    rest = {name: n for name, n in number.items() if n not in (image, split)}
    if given := answers.get("caption-columns"):
        if unknown := [name for name in given.split(",") if name not in rest]:
            raise ValueError(f"--caption-columns {given}: no column {', '.join(unknown)} in {file.name}; it has {', '.join(rest)}")
        return image, [rest[name] for name in given.split(",")], split
    return image, _captions(table, rest, file), split


def _captions(table: Table, rest: dict[str, int], file: Path) -> list[int]:
    """The caption column: named so, or the only one of texts; or a numbered family of them."""
    named = {name: n for name, n in rest.items() if words_of(name) & set(CAPTION_WORDS) and not _share(table.cells(n), str.isdigit) > 0.5}
    texts = named or {name: n for name, n in rest.items() if _share(table.cells(n), lambda cell: " " in cell) > 0.5}
    texts = texts or {name: n for name, n in rest.items() if not _share(table.cells(n), str.isdigit) > 0.5}
    families = {re.sub(r"[\s_-]*\d+$", "", name) for name in texts}
    if len(texts) == 1 or (len(families) == 1 and table.header):
        return list(texts.values())
    if not texts:
        raise ValueError(f"{file.name} has no column of captions; it has {', '.join(table.columns)}")
    shown = {name: f"e.g. {table.cells(n)[0][:60]}" for name, n in texts.items()}
    raise Question(f"{file.name}: more than one column holds texts", "caption-columns", shown | {",".join(texts): "all of them"})


def words_of(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _is_split(name: str, cells: list[str]) -> bool:
    values = {cell for cell in cells if cell}
    return bool(values) and (words_of(name) & set(SPLIT_WORDS) != set() or len(values) < 6) and all(map(role_of, values - {"restval"}))


def _names_image(cell: str) -> bool:
    """Also `a.jpg#0`, the first caption of an image in Flickr8k.token.txt; an empty cell names none, and none else."""
    return looks_like_image(COPY.sub("", cell))


def _share(cells: Sequence[str], holds: object) -> float:
    return sum(bool(holds(cell)) for cell in cells) / len(cells) if cells else 0.0  # type: ignore[operator]


def _bad_rows(file: Path, table: Table, image: int) -> tuple[dict[str, object], tuple[str, ...]]:
    """Options for rows that cannot be read as the others, and what is to be said about them."""
    lines = _rows_of(file.read_bytes().decode("utf-8-sig", errors="replace"))[table.header :]
    nameless = [number for number, line in lines if not "".join(_split(line, table.delimiter)[image : image + 1]).strip()]
    open_quote = [number for number, line in lines if table.delimiter != "\t" and unended(line, table.delimiter)]
    options: dict[str, object] = {}
    notes = []
    if nameless:
        options["bad_rows"] = "quarantine"
        notes.append(f"lines {_some(nameless)} of {file.name} name no image: they are rejected")
    if open_quote and not any('"' in line and number not in open_quote for number, line in lines):
        options["quoting"] = False
        notes.append(f'a `"` in lines {_some(open_quote)} of {file.name} is taken as a character of the caption: no cell is quoted')
    elif open_quote:
        options["bad_rows"] = "quarantine"
        notes.append(f"in lines {_some(open_quote)} of {file.name} a quoted cell does not end: these captions are rejected")
    return options, tuple(notes)


def refuse_broken_lines(file: Path, table: Table) -> None:
    """Raises ValueError for a table that is whole only where its quoted cells go on in the next line: a row is a line here."""
    text = file.read_bytes().decode("utf-8-sig", errors="replace")
    if table.delimiter == "\t" or '"' not in text:
        return
    try:
        rows = [row for row in csv.reader(text.splitlines(keepends=True), delimiter=table.delimiter, skipinitialspace=True) if any(row)]
    except csv.Error:
        return
    broken = [row for row in rows if any("\n" in cell.strip() for cell in row)]
    if len(broken) > 1 and all(len(row) == len(table.columns) and sum(map(_names_image, row)) == 1 for row in broken):
        raise ValueError(
            f"{file}: {len(broken)} quoted cells go on in the next line, the first is {broken[0][-1][:40]!r}: "
            "write each row on one line, or give the captions as JSON lines"
        )


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


def _all_cells(file: Path, table: Table, column: int) -> list[str]:
    """A column of the whole file: a split may begin late in it."""
    rows = (_split(line, table.delimiter) for _, line in _rows_of(file.read_bytes().decode("utf-8-sig", errors="replace"))[table.header :])
    return [row[column].strip() for row in rows if len(row) == len(table.columns)]
