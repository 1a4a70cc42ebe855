"""Winoground: two images and two captions of the same words a row, to be told apart (protocol `winoground`)."""

from __future__ import annotations

from itm.data import files
from itm.data.records import Caption
from itm.data.sources.source import ListedImages, Listing, field_of
from itm.data.sources.tables import read_table_file

SUFFIX = ".png"
NOTES = ("tag", "secondary_tag", "collapsed_tag", "num_main_preds")


class Winoground(ListedImages):
    """`path`: examples.jsonl, rows of `id`, `image_0`, `caption_0`, `image_1`, `caption_1`; `images`: folder of `<image_0>.png`, by
    default `images` beside it. One split, `test`.

    Raises ValueError naming file, line and field for what a row lacks, and for a row or an image that stands there twice.
    """

    def __init__(self, path: str, images: str | None = None) -> None:
        uri = files.absolute(path)
        root = files.absolute(images) if images else files.join(uri.rpartition("/")[0], "images")
        rows: list[Listing] = []
        seen: dict[str, str] = {}
        for row in read_table_file(uri):
            pair = str(field_of(row.cells, "id", row.where))
            for side in (0, 1):
                name, text = (field_of(row.cells, f"{what}_{side}", row.where) for what in ("image", "caption"))
                if not isinstance(name, str) or not isinstance(text, str) or not name or not text.strip():
                    raise ValueError(f"{row.where}: image_{side} and caption_{side} are texts, not {name!r} and {text!r}")
                if other := seen.get(name):
                    raise ValueError(f"{row.where}: the image {name} stands at {other} already")
                seen[name] = row.where
                meta = {"image_id": name, "pair": pair, "side": side} | {n: row.cells[n] for n in NOTES if n in row.cells}
                file = name if "." in name.rpartition("/")[2] else name + SUFFIX
                rows.append(Listing(file, [Caption(f"{pair}#{side}", text)], meta))
        pairs = [row.meta["pair"] for row in rows[::2]]
        if twice := [pair for n, pair in enumerate(pairs) if pair in pairs[:n]]:
            raise ValueError(f"{uri}: the id {twice[0]} stands there twice")
        if not rows:
            raise ValueError(f"{uri} holds no row")
        super().__init__(root, {"test": rows}, [uri])
