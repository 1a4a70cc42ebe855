"""The lists of ALBEF, BLIP and CUSA: `[{"image" or "image_path": file, "caption": text or list of texts, "image_id": any}, ...]`."""

from __future__ import annotations

from collections.abc import Iterator

from itm.data.formats import Json
from itm.data.records import Caption
from itm.data.sources.source import ListedImages, caption_of, field_of, group_by_path, paths_by_split, read_json


class PairsJson(ListedImages):
    """`path`: a file name with `{split}`, or a mapping split: file. Rows of the same image are joined into one sample.

    Raises ValueError naming file and row when a row lacks its image or caption.
    """

    def __init__(self, path: str | dict[str, str], image_root: str = ".") -> None:
        paths = paths_by_split(path)
        super().__init__(image_root, {split: group_by_path(_rows(p)) for split, p in paths.items()}, paths.values())


def _rows(path: str) -> Iterator[tuple[str, list[Caption], Json]]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of pairs, not a {type(rows).__name__}")
    for number, row in enumerate(rows):
        where = f"{path} row {number}"
        said = field_of(row, "caption", where)
        image = row.get("image_path", row.get("image"))
        if not image:
            raise ValueError(f"{where} needs `image` (or `image_path`) and `caption`; it has {', '.join(row)}")
        captions = [caption_of(text, where) for text in (said if isinstance(said, list) else [said])]
        yield image, captions, {"image_id": row["image_id"]} if "image_id" in row else {}
