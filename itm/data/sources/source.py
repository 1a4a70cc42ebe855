"""What every source offers, and the base of those that list image files with captions."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from itm.data.records import Caption, Problem, Record

_FORMATS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}


class Source(ABC):
    """Raw data. Item k of a split is the same record in every process, so that any slice can be packed anywhere."""

    splits: list[str]

    @abstractmethod
    def count(self, split: str) -> int:
        """How many items the split has, usable or not."""

    @abstractmethod
    def item(self, split: str, index: int) -> Record | Problem:
        """One item; a Problem (stage "source") when its files are missing or unreadable."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the records depend on, JSON-able: another identity means other shards."""

    def records(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[Record | Problem]:
        """Items [start, stop) in order. Raises ValueError naming the known splits."""
        if split not in self.splits:
            raise ValueError(f"no split {split!r} here; there are: {', '.join(self.splits) or 'none'}")
        count = self.count(split)
        for index in range(start, count if stop is None else min(stop, count)):
            yield self.item(split, index)


@dataclass
class Listing:
    """One image file and what is said about it."""

    path: str
    captions: list[Caption] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


class ListedImages(Source):
    """Image files with captions, from annotation files read once. Subclasses give `listings` by split and the annotation paths."""

    def __init__(self, image_root: str | Path, listings: dict[str, list[Listing]], annotations: Iterable[Path]) -> None:
        self.image_root = Path(image_root)
        self.listings = listings
        self.splits = list(listings)
        self.digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in annotations]
        self._keys = {split: unique_keys([row.path for row in rows]) for split, rows in listings.items()}

    def count(self, split: str) -> int:
        return len(self.listings[split])

    def identity(self) -> dict[str, Any]:
        return {"source": type(self).__name__, "image_root": str(self.image_root), "annotations": self.digests}

    def item(self, split: str, index: int) -> Record | Problem:
        row, key = self.listings[split][index], self._keys[split][index]
        path = self.image_root / row.path
        if path.suffix.lower() not in _FORMATS:
            return Problem(key, "", "source", f"{path} is not a jpg, png or webp file")
        try:
            image = path.read_bytes()
        except OSError as error:
            return Problem(key, "", "source", f"{path} cannot be read: {error.strerror}")
        meta = {"image_id": key, "filename": row.path, **row.meta}
        return Record(key, split, row.captions, image, _FORMATS[path.suffix.lower()], meta=meta)


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


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file when it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no annotation file at {path}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def group_by_path(rows: Iterable[tuple[str, str, str | None, dict[str, Any]]]) -> list[Listing]:
    """(path, caption, caption id or None, meta) rows -> one Listing per path in order of first sight."""
    listings: dict[str, Listing] = {}
    for path, text, caption_id, meta in rows:
        listing = listings.setdefault(path, Listing(path, meta=meta))
        listing.captions.append(Caption(caption_id or f"{path}#{len(listing.captions)}", text))
    return list(listings.values())
