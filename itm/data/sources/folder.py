"""Photos as people keep them: a folder with sub-folders, a zip or a tar; captions beside them, in a metadata file, or none at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from itm.data.formats import Json
from itm.data.records import Caption, Problem, Record, image_format
from itm.data.sources.photos import open_photos
from itm.data.sources.pictures import SUFFIXES, image_fault, is_image
from itm.data.sources.source import Source, caption_of, unique_keys
from itm.data.sources.splits import SPLIT_NAMES, in_order
from itm.data.sources.tables import Row, normal, read_rows, text_lines

CAPTION_COLUMNS = ("caption", "captions", "text")
"""What a column of captions is called where nobody says; of several the user has to choose."""
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")


@dataclass
class _Photo:
    """name: below the folder. lost: why there is no such file, though a metadata file lists it."""

    name: str
    text: str | None = None
    captions: list[Caption] = field(default_factory=list)
    meta: Json = field(default_factory=dict)
    lost: str | None = None


class ImageFolder(Source):
    """`path`: a folder, a zip or a tar (`.tar.gz` as well) of images, which are known by their bytes, whatever they are called.

    Captions are the lines of a `.txt` of the same name beside an image, or a column of a `metadata.jsonl`, `.csv`, `.tsv` or `.parquet`
    whose `file_name` is relative to its own folder. `caption_columns`: that column, or several; unset = the one of `caption`,
    `captions`, `text` that is there; an empty list = none. A split in which no image has a caption
    is packed without.
    Folders `train`, `validation`, `test` (and their other usual names) right below `path` are splits; else all is `train`.
    Raises ValueError naming file and line of what cannot be read, and for split folders beside others.
    """

    def __init__(self, path: str, caption_columns: list[str] | str | None = None) -> None:
        self.photos = open_photos(path)
        self.columns = [caption_columns] if isinstance(caption_columns, str) else caption_columns
        named = [n for n in self.photos.names if _suffix(n) in SUFFIXES]
        texts = {n for n in self.photos.names if _suffix(n) == "txt"}
        metadata = [n for n in self.photos.names if n.rpartition("/")[2].lower() in _METADATA]
        unknown = [n for n in self.photos.names if n not in texts and n not in metadata and _suffix(n) not in SUFFIXES]
        with ThreadPoolExecutor(8) as pool:
            images = {n for n, head in zip(unknown, pool.map(self.photos.head, unknown), strict=True) if is_image(head)}
        found = {n: _Photo(n) for n in sorted({*named, *images})}
        if not found:
            raise ValueError(f"no image in {self.photos.uri}: it holds {len(self.photos.names)} files, none of an image format")
        self.digests = {n: hashlib.sha256(self.photos.read(n)).hexdigest() for n in metadata}
        for name in metadata:
            self._join(found, name)
        used = self._beside(found, texts)
        rest = [(n, "no image, no captions of one, no metadata") for n in sorted({*unknown, *texts} - images - used)]
        self.over = sorted(self.photos.passed_over + rest)
        self.listings = _by_split(found.values(), self.photos.uri)
        self.splits = list(self.listings)
        self._keys = {split: unique_keys([p.name for p in photos]) for split, photos in self.listings.items()}

    def count(self, split: str) -> int:
        return len(self.listings[split])

    def identity(self) -> Json:
        """Images are known by name and size, files of captions by their bytes."""
        digest = hashlib.sha256()
        for name, size in self.photos.names.items():
            digest.update(f"{name}\0{size}\n".encode(errors="surrogatepass"))
        texts = [p.text for photos in self.listings.values() for p in photos if p.text]
        with ThreadPoolExecutor(8) as pool:
            for name, data in zip(texts, pool.map(self.photos.read, texts), strict=True):
                digest.update(name.encode(errors="surrogatepass") + hashlib.sha256(data).digest())
        return {"source": "ImageFolder", "files": digest.hexdigest(), "metadata": self.digests, "columns": self.columns}

    def uncaptioned(self, split: str) -> bool:
        return not any(photo.captions or photo.text for photo in self.listings[split])

    def passed_over(self, split: str) -> list[Problem]:
        """The files that are no item, with the first split."""
        return [Problem(n, "", "source", reason, "member") for n, reason in self.over] if split == self.splits[0] else []

    def abouts(self, split: str) -> Iterator[Json]:
        for photo, key in zip(self.listings[split], self._keys[split], strict=True):
            yield {"key": key, "image_id": key, "filename": photo.name, **photo.meta}

    def item(self, split: str, index: int) -> Record | Problem:
        photo, key = self.listings[split][index], self._keys[split][index]
        captions = [*photo.captions, *(self._lines(photo.text) if photo.text else [])]
        fault, image = photo.lost, b""
        try:
            image = b"" if fault else self.photos.read(photo.name)
        except ValueError as error:
            fault = str(error)
        if not fault and (said := image_fault(image)):
            fault = f"{self.photos.place(photo.name)} {said}"
        if fault:
            return Problem(key, "", "source", fault, captions=len(captions))
        meta = {"image_id": key, "filename": photo.name, **photo.meta}
        return Record(
            key, split, [replace(c, id=f"{key}#{n}") for n, c in enumerate(captions)], image, image_format(image) or "", meta=meta
        )

    def _lines(self, name: str) -> list[Caption]:
        """The captions of a `.txt`; a blank line is none."""
        try:
            return [Caption("", line) for line in text_lines(self.photos.place(name), self.photos.read(name)) if line.strip()]
        except ValueError as error:
            return [Caption("", "", unread=str(error))]

    def _join(self, found: dict[str, _Photo], metadata: str) -> None:
        """Give the photos what the rows of a metadata file say; a row whose file is missing becomes a photo that is lost."""
        place, folder = self.photos.place(metadata), metadata.rpartition("/")[0]
        rows = list(read_rows(place, metadata, self.photos.read(metadata)))
        columns = caption_columns_of(self.columns, {name for row in rows for name in row.cells}, place)
        for row in rows:
            said = row.cells.get("file_name")
            if not isinstance(said, str) or not said:
                raise ValueError(f"{row.where} has no `file_name`; it has {', '.join(row.cells) or 'no cell'}")
            name = "/".join(filter(None, (folder, normal(said))))
            photo = found.setdefault(name, _Photo(name, lost=f"{row.where}: no image {said} beside the metadata file"))
            photo.captions += captions_of(row, columns)
            plain = {n: v for n, v in row.cells.items() if isinstance(v, str | int | float | bool) and n not in ("file_name", *columns)}
            photo.meta = plain | photo.meta

    def _beside(self, found: dict[str, _Photo], texts: Iterable[str]) -> set[str]:
        """Give each photo the `.txt` of its name; which of them were used."""
        of_stem = {name.rpartition(".")[0]: name for name in texts}
        for name, photo in found.items():
            photo.text = of_stem.get(name) or of_stem.get(name.rpartition(".")[0])
        return {photo.text for photo in found.values() if photo.text}


def caption_columns_of(chosen: list[str] | None, there: Iterable[str], where: str) -> list[str]:
    """The columns of captions of a table with the columns `there`. Raises ValueError naming `where` and what there is."""
    known = sorted(there)
    if chosen is not None:
        if missing := [name for name in chosen if name not in known]:
            raise ValueError(f"{where} has no column {', '.join(missing)}; it has {', '.join(known)} (set caption_columns)")
        return chosen
    usual = [name for name in CAPTION_COLUMNS if name in known]
    if len(usual) == 1:
        return usual
    what = f"more than one column of captions, {', '.join(usual)}" if usual else f"no column {', '.join(CAPTION_COLUMNS)}"
    raise ValueError(f"{where} has {what}; it has {', '.join(known)}: set caption_columns, [] for images without captions")


def captions_of(row: Row, columns: Iterable[str]) -> list[Caption]:
    """The captions of a row: text, or a list of texts, in each column. What cannot be told is one that says so."""
    captions: list[Caption] = []
    for name in columns:
        if row.fault or name not in row.cells:
            captions.append(Caption("", "", unread=row.fault or f"{row.where} has no {name}"))
            continue
        said = row.cells[name]
        captions += [caption_of(text, row.where) for text in (said if isinstance(said, list) else [said])]
    return captions


def _suffix(name: str) -> str:
    base = name.rpartition("/")[2]
    return base.rpartition(".")[2].lower() if "." in base else ""


def _by_split(photos: Iterable[_Photo], where: str) -> dict[str, list[_Photo]]:
    """Split folders lie right below the top, or below the one folder that an archive begins with."""
    rows = list(photos)
    parts = [row.name.split("/") for row in rows]
    depth = 0
    while len({tuple(p[: depth + 1]) for p in parts}) == 1 and parts[0][depth].lower() not in SPLIT_NAMES and len(parts[0]) > depth + 1:
        depth += 1
    tops = {p[depth] if len(p) > depth + 1 else "" for p in parts}
    splits = {top for top in tops if top.lower() in SPLIT_NAMES}
    if not splits:
        return {"train": rows}
    if others := sorted(tops - splits):
        beside = ", ".join(other or "images without a folder" for other in others)
        raise ValueError(
            f"{where} has the split folders {', '.join(sorted(splits))} and also {beside}: move these out, or give one as path"
        )
    listings: dict[str, list[_Photo]] = {}
    for row, part in zip(rows, parts, strict=True):
        listings.setdefault(SPLIT_NAMES[part[depth].lower()], []).append(row)
    return in_order(listings)
