"""Lists of images and captions as JSON: those of ALBEF, BLIP and CUSA, JSON lines, and objects `{file: captions}`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from itm.data.formats import Json
from itm.data.records import Caption
from itm.data.sources.source import ListedImages, caption_of, field_of, group_by_path, paths_by_split, read_text


class PairsJson(ListedImages):
    """`path`: a file name with `{split}`, or a mapping split: file. Rows of the same image are joined into one sample.

    A file is `[{"image" or "image_path": file, "caption": text or list of texts, "image_id": any}, ...]`, the same objects one a line,
    the only list of objects that an object holds, or `{file: text or list of texts}`. `image_field`, `caption_fields`: what the fields
    are called where they are not called so. Raises ValueError naming file and row when a row lacks its image or caption, and for a name
    that stands twice in an object.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        image_root: str = ".",
        image_field: str | None = None,
        caption_fields: list[str] | str = "caption",
    ) -> None:
        paths = paths_by_split(path)
        captions = [caption_fields] if isinstance(caption_fields, str) else list(caption_fields)
        self.fields = image_field, captions
        super().__init__(image_root, {s: group_by_path(_rows(p, image_field, captions)) for s, p in paths.items()}, paths.values())

    def identity(self) -> Json:
        """The names of the fields count where they are not the usual ones."""
        named = {} if self.fields == (None, ["caption"]) else {"fields": [self.fields[0], *self.fields[1]]}
        return super().identity() | named


def read_pairs(path: str, text: str) -> list[Any]:
    """The rows of the text of a file. Raises ValueError naming it, and the line, when it is no JSON or no list of pairs."""
    try:
        said = json.loads(text, object_pairs_hook=_once)
    except _Twice as error:
        raise ValueError(f"{path}: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():
            return _lines(path, text)
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(said, list):
        return said
    rows = rows_of(said)
    if rows is None:
        raise ValueError(f"{path} must hold a list of pairs, not a {type(said).__name__}")
    return rows


def rows_of(said: Any) -> list[Any] | None:
    """The rows of an object: the only list of objects in it, or a row for each name; None where it is neither."""
    if not isinstance(said, dict) or not said:
        return None
    lists = [value for value in said.values() if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)]
    if lists:
        return lists[0] if len(lists) == 1 else None
    if "caption" in said and ("image" in said or "image_path" in said):
        return [said]  # JSON lines of one line
    if not all(isinstance(value, str | list) for value in said.values()):
        return None
    return [{"image": name, "caption": value} for name, value in said.items()]


class _Twice(ValueError):
    """A name stands twice in one object: all but the last would be lost."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for n, name in enumerate(names) if name in names[:n])
        raise _Twice(f"{twice!r} stands twice in one object; write all captions of an image as one list")
    return row


def _lines(path: str, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line, object_pairs_hook=_once))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from None
    return rows


def _rows(path: str, image_field: str | None, caption_fields: list[str]) -> Iterator[tuple[str, list[Caption], Json]]:
    for number, row in enumerate(read_pairs(path, read_text(path))):
        where = f"{path} row {number}"
        texts = [field_of(row, name, where) for name in caption_fields]
        image = row.get(image_field) if image_field else row.get("image_path", row.get("image"))
        if not isinstance(image, str) or not image:
            named = f"`{image_field}`" if image_field else "`image` (or `image_path`)"
            raise ValueError(f"{where} needs {named} and `{'`, `'.join(caption_fields)}`; it has {', '.join(row)}")
        captions = [caption_of(text, where) for said in texts for text in (said if isinstance(said, list) else [said])]
        yield image, captions, {"image_id": row["image_id"]} if "image_id" in row else {}
