"""What every source offers, and the base of those that list image files with captions."""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from itm.data import files
from itm.data.formats import Json
from itm.data.records import Caption, Problem, Record, image_format

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Source(ABC):
    """Raw data. Item k of a split is the same record in every process, so that any slice can be packed anywhere."""

    splits: list[str]
    regions_dtype: str = "fp16"
    """How `itm pack` stores region features (data.regions_dtype); a source checks them in it."""

    @abstractmethod
    def count(self, split: str) -> int:
        """How many items the split has, usable or not."""

    @abstractmethod
    def item(self, split: str, index: int) -> Record | Problem:
        """One item; a Problem (stage "source") when its files are missing or unreadable."""

    @abstractmethod
    def identity(self) -> Json:
        """What the records depend on, JSON-able: another identity means other shards."""

    @staticmethod
    def relevance(images: list[Json], captions: list[Json]) -> np.ndarray | None:
        """(I,T) bool, every pair that truly holds, from the metadata of samples (I) and captions (T); None when that is not known."""
        return None

    def uncaptioned(self, split: str) -> bool:
        """Whether the split is of images alone: they are packed without captions, where else an image without one is rejected."""
        return False

    def passed_over(self, split: str) -> list[Problem]:
        """What lies among the files of a split and is no item (a Mac's notes, a text of no image): listed, of what `member`."""
        return []

    def abouts(self, split: str) -> Iterator[Json]:
        """Key and metadata of every item, in order; a source that can gives them without reading an image."""
        for item in self.records(split):
            yield {"key": item.key, **(item.meta if isinstance(item, Record) else {})}

    def places(self, split: str, start: int, stop: int) -> list[Any]:
        """Where items [start, stop) are found, JSON-able: a process that has not looked through the data reads them by `at`."""
        return list(range(start, stop))

    def at(self, split: str, places: list[Any]) -> Iterator[Record | Problem]:
        """The items at these places, in order."""
        for index in places:
            yield self.item(split, index)

    def records(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[Record | Problem]:
        """Items [start, stop) in order. Raises ValueError naming the known splits."""
        if split not in self.splits:
            raise ValueError(f"no split {split!r} here; there are: {', '.join(self.splits) or 'none'}")
        count = self.count(split)
        yield from self.at(split, self.places(split, start, count if stop is None else min(stop, count)))


def stored_features(features: np.ndarray, dtype: str) -> np.ndarray:
    """Region features in the type (fp16, fp32) that they are stored in. Raises ValueError when it cannot hold them."""
    with np.errstate(over="ignore"):
        kept = features.astype(np.float16 if dtype == "fp16" else np.float32)
    if not np.isfinite(kept).all():
        raise ValueError(f"not finite in {kept.dtype}")
    return kept


@dataclass
class Listing:
    """One image file and what is said about it."""

    path: str
    captions: list[Caption] = field(default_factory=list)
    meta: Json = field(default_factory=dict)


class ListedImages(Source):
    """Image files with captions, from annotation files that are read once. `image_root` may hold `{split}`.

    An item whose file is missing is a Problem. A caption without an id gets `<key>#<position>`.
    """

    def __init__(self, image_root: str, listings: dict[str, list[Listing]], annotations: Iterable[str]) -> None:
        self.image_root = str(image_root)
        self.listings = listings
        self.splits = list(listings)
        self.digests = [hashlib.sha256(files.read_bytes(uri)).hexdigest() for uri in annotations]
        self._keys = {split: unique_keys([row.path for row in rows]) for split, rows in listings.items()}

    def count(self, split: str) -> int:
        return len(self.listings[split])

    def identity(self) -> Json:
        return {"source": type(self).__name__, "image_root": self.image_root, "annotations": self.digests}

    def uncaptioned(self, split: str) -> bool:
        return not any(row.captions for row in self.listings[split])

    def abouts(self, split: str) -> Iterator[Json]:
        for row, key in zip(self.listings[split], self._keys[split], strict=True):
            yield {"key": key, "image_id": key, "filename": row.path, **row.meta}

    def place_of(self, split: str, row: Listing) -> str:
        """The file of a listed image, a URI."""
        return below(self.image_root.replace("{split}", split), row.path)

    def item(self, split: str, index: int) -> Record | Problem:
        row, key = self.listings[split][index], self._keys[split][index]
        uri = self.place_of(split, row)
        try:
            image = read_file(uri)
        except ValueError as error:
            return Problem(key, "", "source", str(error), captions=len(row.captions))
        found = image_format(image)  # whatever its name says
        if found is None and not uri.lower().endswith(_SUFFIXES):
            return Problem(key, "", "source", f"{uri} is no jpg, png, webp, gif, bmp or tiff file", captions=len(row.captions))
        captions = [replace(c, id=c.id or f"{key}#{n}") for n, c in enumerate(row.captions)]
        meta = {"image_id": key, "filename": row.path, **row.meta}
        return Record(key, split, captions, image, found or "jpg", meta=meta)


def below(root: str, path: str) -> str:
    """The file that a listing below `root` calls `path`, which may also be absolute or a URI."""
    if files.is_remote(path) or path.startswith(("/", "file:")):
        return files.absolute(path)
    uri = files.join(files.absolute(root), path.removeprefix("./"))
    return files.absolute(uri)


def read_file(uri: str) -> bytes:
    """The bytes of a file on any file system. Raises ValueError naming it and what is wrong."""
    try:
        return files.read_bytes(uri)
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
        raise ValueError(f"{uri} cannot be read: {said}") from None


def paths_by_split(path: str | dict[str, str]) -> dict[str, str]:
    """`path` is {split: file}, or one file name with `{split}`: then every one of train, val, test that exists. Files as URIs.

    Raises ValueError when nothing is there.
    """
    if isinstance(path, dict):
        found = {split: files.absolute(p) for split, p in path.items()}
    elif "{split}" in path:
        found = {s: uri for s in ("train", "val", "test") if files.exists(uri := files.absolute(path.replace("{split}", s)))}
    else:
        found = {"train": files.absolute(path)}
    missing = [uri for uri in found.values() if not files.exists(uri)]
    if missing or not found:
        raise ValueError(f"no annotation file at {', '.join(missing) or path}; give {{split}} in the path or a mapping split: file")
    return found


def unique_keys(paths: list[str]) -> list[str]:
    """A shard key for each path: its stem; where stems collide, more of the path (and at last the position)."""
    keys: list[str] = []
    taken: set[str] = set()
    for position, path in enumerate(paths):
        whole = re.sub(r"^(\./)+|\.\w+$", "", path)
        for name in (whole.rpartition("/")[2], whole, f"{whole}-{position}"):
            key = re.sub(r"[^\w-]+", "_", name, flags=re.ASCII).strip("_")
            if key and key not in taken:
                break
        taken.add(key)
        keys.append(key)
    return keys


def caption_of(said: object, where: str, caption_id: str = "") -> Caption:
    """A caption from the value of an annotation file; what is no text becomes one that says so, and is quarantined. where: file and row."""
    if isinstance(said, str):
        return Caption(caption_id, said)
    found = "null" if said is None else f"of type {type(said).__name__}, no text"
    return Caption(caption_id, "", unread=f"{where}: the caption is {found}")


def field_of(row: object, name: str, where: str) -> Any:
    """A field that every row of an annotation file must have. Raises ValueError naming file, row and field, with the fields there are."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, not an object with `{name}`")
    if name not in row:
        raise ValueError(f"{where} has no `{name}`; it has {', '.join(row) or 'no field at all'}")
    return row[name]


def refuse_pointer(path: str | Path, start: bytes) -> None:
    """Raises ValueError when a file that begins with `start` is what Git LFS left in place of the real one."""
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository, or download the file")


def refuse_other_files(path: str | Path, start: bytes) -> None:
    """Raises ValueError naming what a file is that begins with `start` and should be a text, with the remedy."""
    refuse_pointer(path, start)
    found = next((what for head, what in _NO_TEXT.items() if start.startswith(head)), None)
    if found:
        raise ValueError(f"{path} is {found}")


_NO_TEXT = {
    b"PK\x03\x04": "an Excel workbook or a zip, whatever its name says: save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook, whatever its name says: save the sheet as CSV UTF-8",
    b"\x1f\x8b": "compressed by gzip: run `gunzip` on it",
    b"\xff\xfe": "UTF-16, as Excel's Unicode text is: save it as CSV UTF-8, or convert it with `iconv -f utf-16 -t utf-8`",
    b"\xfe\xff": "UTF-16: save it as CSV UTF-8, or convert it with `iconv -f utf-16 -t utf-8`",
    b"PAR1": "a Parquet table, whatever its name says: call it .parquet",
}


def read_text(path: str | Path) -> str:
    """A UTF-8 file without its byte order mark. Raises ValueError naming the file when it is missing or of another encoding."""
    if not files.exists(path):
        raise ValueError(f"no annotation file at {path}")
    data = read_file(str(path))
    refuse_other_files(path, data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); if it is Latin-1, convert it with "
            f"`iconv -f latin1 -t utf-8 {files.name_of(path)}`, if it comes from Excel, save it as CSV UTF-8"
        ) from None


def read_json(path: str | Path) -> Any:
    """Raises ValueError naming the file when it is missing, of another encoding than UTF-8, or no JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def group_by_path(rows: Iterable[tuple[str, list[Caption], Json]]) -> list[Listing]:
    """(path, captions, meta) rows -> one Listing per path in order of first sight, with the meta of its first row."""
    listings: dict[str, Listing] = {}
    for path, captions, meta in rows:
        listings.setdefault(path, Listing(path, meta=meta)).captions.extend(captions)
    return list(listings.values())
