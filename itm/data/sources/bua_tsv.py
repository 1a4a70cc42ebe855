"""Bottom-up-attention TSV files: one row an image, `image_id image_w image_h num_boxes boxes features`, arrays as base64 of float32."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from itm.data import files
from itm.data.formats import Json
from itm.data.records import Problem, Record, Regions
from itm.data.sources.source import ListedImages, Source, stored_features, unique_keys
from itm.kinds import build_part

FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")


class BuaTsv(Source):
    """`features`: a TSV file or several; `captions`: a source of image files whose captions and splits are taken, their images not read.

    Rows and images meet by the stem of the file name, its part behind the last underscore, or the image_id of the captions, leading
    zeros aside. Opening reads the files once, to know where each row begins.
    Raises ValueError for a row that is no row, and for two rows of one id.
    """

    def __init__(self, features: str | list[str], captions: Mapping[str, Any]) -> None:
        from itm.data.sources import SOURCES

        said = build_part(SOURCES, captions.get("kind", ""), captions.get("options", {}), "data.source.options.captions")
        if not isinstance(said, ListedImages):
            raise ValueError(f"captions.kind={captions.get('kind')!r} lists no images: take karpathy, coco_captions, pairs_json or csv")
        self.said, self.splits = said, said.splits
        self.files = [Path(files.absolute(f)) for f in ([features] if isinstance(features, str) else features)]
        self.rows: dict[str, tuple[int, int, int]] = {}
        self._lines: dict[str, int] = {}
        for number, file in enumerate(self.files):
            self._index(number, file)
        self._keys = {split: unique_keys([row.path for row in rows]) for split, rows in said.listings.items()}

    def count(self, split: str) -> int:
        return self.said.count(split)

    def identity(self) -> Json:
        """The files are known by the ids and places of all rows and by the first row: hashing tens of GB would take minutes."""
        digest = hashlib.sha256(repr(sorted(self.rows.items())).encode())
        for place in list(self.rows.values())[:1]:
            digest.update(self._row(place))
        return {"source": "BuaTsv", "features": digest.hexdigest(), "captions": self.said.identity()}

    def item(self, split: str, index: int) -> Record | Problem:
        listing, key = self.said.listings[split][index], self._keys[split][index]
        stem, given = Path(listing.path).stem, listing.meta.get("image_id")
        names = [stem, stem.split("_")[-1]]
        if given is not None and given != listing.meta.get("imgid"):  # a position in a Karpathy file could be another image's id
            names.append(str(given))
        place = next((self.rows[_plain(name)] for name in names if _plain(name) in self.rows), None)
        if place is None:
            files = ", ".join(str(f) for f in self.files)
            reason = f"{listing.path} has no row in {files}: none of {names} is an image_id there"
            return Problem(key, "", "source", reason, captions=len(listing.captions))
        try:
            regions = read_row(self._row(place), self.regions_dtype)
        except ValueError as error:
            reason = f"{self.files[place[0]]} at byte {place[1]}: {error}"
            return Problem(key, "", "source", reason, captions=len(listing.captions))
        captions = [replace(c, id=c.id or f"{key}#{n}") for n, c in enumerate(listing.captions)]
        return Record(key, split, captions, regions=regions, meta={"image_id": key, "filename": listing.path, **listing.meta})

    def _index(self, number: int, file: Path) -> None:
        try:
            stream = file.open("rb")
        except OSError as error:
            raise ValueError(f"data.source.options.features: {file} cannot be read: {error.strerror}") from None
        with stream:
            at = 0
            for count, line in enumerate(stream, 1):
                cells = line.split(b"\t", 2)
                if len(cells) < 3:
                    raise ValueError(f"{file} at byte {at} is no row of {' '.join(FIELDS)}, separated by tabs")
                name = _plain(cells[0].decode(errors="replace"))
                if name in self.rows:
                    earlier = f"{self.files[self.rows[name][0]]} line {self._lines[name]}"
                    raise ValueError(f"image_id {name} has a row in {earlier} and in {file} line {count}: keep the right one of them")
                self.rows[name], self._lines[name] = (number, at, len(line)), count
                at += len(line)

    def _row(self, place: tuple[int, int, int]) -> bytes:
        number, at, length = place
        with self.files[number].open("rb") as stream:
            stream.seek(at)
            return stream.read(length)


def read_row(line: bytes, dtype: str = "fp16") -> Regions:
    """Regions of one row. Raises ValueError when numbers and bytes do not fit together, or `dtype` cannot hold the features."""
    cells = line.rstrip(b"\r\n").split(b"\t")
    if len(cells) != len(FIELDS):
        raise ValueError(f"{len(cells)} fields, want {len(FIELDS)}: {' '.join(FIELDS)}")
    width, height, count = (int(cell) for cell in cells[1:4])
    try:
        boxes, features = (np.frombuffer(base64.b64decode(cell, validate=True), np.float32) for cell in cells[4:])
    except binascii.Error as error:
        raise ValueError(f"boxes or features are no base64: {error}") from None
    if count < 1 or boxes.size != 4 * count or not features.size or features.size % count:
        raise ValueError(f"num_boxes is {count}, but there are {boxes.size} box numbers and {features.size} feature numbers")
    if not np.isfinite(boxes).all():
        raise ValueError("boxes are not finite")
    try:
        kept = stored_features(features.reshape(count, -1), dtype)
    except ValueError as error:
        raise ValueError(f"features are {error}") from None
    return Regions(kept, boxes.reshape(count, 4), width, height)


def _plain(name: str) -> str:
    return name.strip().lstrip("0") or "0"
