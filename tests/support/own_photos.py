"""Photos and captions as people keep them: drawn scenes, some of them broken, in folders, tables, archives and databases."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from itm.data.records import Record
from itm.data.sources.scenes import Scenes


def scenes(count: int, world: str = "equiv") -> list[Record]:
    """Pictures with captions that tell them apart."""
    return [record for record in Scenes(world, n_train=count).records("train") if isinstance(record, Record)]


def write_photos(folder: Path, records: Sequence[Record], folders: Sequence[str] = ("",), broken: Sequence[int] = ()) -> list[str]:
    """Image files below `folder`, dealt to sub-folders; returns their paths from there. broken: numbers of those cut short."""
    names = []
    for number, record in enumerate(records):
        below = folder / folders[number % len(folders)]
        below.mkdir(parents=True, exist_ok=True)
        path = below / f"photo{number:03d}.png"
        data = record.image or b""
        path.write_bytes(data[: len(data) // 3] if number in broken else data)
        names.append(str(path.relative_to(folder)))
    return names


def table(names: Sequence[str], records: Sequence[Record], delimiter: str = ",", header: bool = True) -> str:
    """Rows of image and caption."""
    out = io.StringIO()
    rows = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    if header:
        rows.writerow(("image", "caption"))
    for name, record in zip(names, records, strict=True):
        rows.writerows((name, caption.text) for caption in record.captions)
    return out.getvalue()


def walk_world(folder: Path) -> list[Record]:
    """60 photos in two folders, three of them broken, and captions.csv with a stray quote, a comma and a missing file.

    Returns the records in the order of the photos `photo000.png`, ...
    """
    records = scenes(60)
    names = write_photos(folder / "photos", records, ("garden", "street"), broken=(7, 20, 41))
    lines = table(names, records).splitlines()
    lines[1] = f'{names[0]},"{records[0].captions[0].text}'
    lines[-1] = f"{names[-1]},{records[-1].captions[-1].text}, as far as one sees"
    (folder / "captions.csv").write_text("\n".join([*lines, "garden/lost.png,a photo that nobody has", ""]))
    return records
