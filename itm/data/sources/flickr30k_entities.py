"""Flickr30k Entities (Plummer et al., ICCV 2015): which phrase of a caption means which boxes, added to regions of any source.

Sentences/<id>.txt holds a caption a line, its phrases marked as `[/EN#<entity>/<type> words]`, Annotations/<id>.xml the boxes of an
entity. A caption gets `entities` in its metadata, which ISDa reads: {"entity": id, "spans": [[start, end], ...], "regions": [...]},
characters of the caption and positions of the regions that lie on a box (docs/methods/iais.md#annotated-entities).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from itm.data import files
from itm.data.formats import Json
from itm.data.records import Caption, Problem, Record, Regions
from itm.data.sources.source import Source, read_file
from itm.kinds import build_part

Phrase = tuple[str, int, int]
"""Entity, and the characters [start, end) of the sentence that name it."""
Boxes = dict[str, np.ndarray]
"""Entity -> (K,4) float64 x1 y1 x2 y2, shares of the image's width and height."""

_PHRASE = re.compile(r"\[/EN#(\d+)(?:/[^\s\[\]]+)*\s+([^\[\]]*[^\[\]\s])\s*\]")
NOT_VISUAL = "0"
"""The entity of all phrases that mean nothing to be seen."""


class Flickr30kEntities(Source):
    """`path`: the folder with Sentences and Annotations; `regions`: the source whose images, regions and captions are taken.

    A region is of an entity when its IoU with one of the entity's boxes is at least `iou`. An entity without a box (a scene, nothing
    visible) or without such a region keeps an empty list: ISDa leaves it out and counts it. An image is found by the digits at the end of
    its file name, without leading zeros; one without its two files, with files of another image, or without boxes of its regions, is
    quarantined, and so is a caption that none of the image's sentences is (letters and digits are compared) or whose markup is unreadable.
    Raises ValueError when `path` has not both folders, or for an iou outside (0, 1].
    """

    def __init__(self, path: str, regions: Mapping[str, Any], iou: float = 0.5) -> None:
        from itm.data.sources import SOURCES

        self.path, self.iou = files.absolute(path), iou
        missing = [name for name in ("Sentences", "Annotations") if not files.is_folder(files.join(self.path, name))]
        if missing:
            raise ValueError(
                f"{self.path} has no folder {missing[0]}: give the folder of Flickr30k Entities, with Sentences and Annotations"
            )
        if not 0 < iou <= 1:
            raise ValueError(f"data.source.options.iou is above 0 and at most 1, not {iou}")
        self.of = build_part(SOURCES, regions.get("kind", ""), regions.get("options", {}), "data.source.options.regions")
        self.splits = self.of.splits

    def count(self, split: str) -> int:
        return self.of.count(split)

    def identity(self) -> Json:
        """The annotation is known by the names and sizes of its files: they are 63,566."""
        held = {name: size for name, size in files.walk(self.path).items() if name.startswith(("Sentences/", "Annotations/"))}
        digest = hashlib.sha256(repr(sorted(held.items())).encode()).hexdigest()
        return {"source": "Flickr30kEntities", "entities": digest, "iou": self.iou, "regions": self.of.identity()}

    def uncaptioned(self, split: str) -> bool:
        return self.of.uncaptioned(split)

    def passed_over(self, split: str) -> list[Problem]:
        return self.of.passed_over(split)

    def abouts(self, split: str) -> Iterator[Json]:
        return self.of.abouts(split)

    def places(self, split: str, start: int, stop: int) -> list[Any]:
        return self.of.places(split, start, stop)

    def item(self, split: str, index: int) -> Record | Problem:
        return next(self.at(split, self.places(split, index, index + 1)))

    def at(self, split: str, places: list[Any]) -> Iterator[Record | Problem]:
        self.of.regions_dtype = self.regions_dtype
        for item in self.of.at(split, places):
            yield item if isinstance(item, Problem) else self._annotated(item)

    def _annotated(self, record: Record) -> Record | Problem:
        try:
            image = image_number(str(record.meta.get("filename") or record.key))
            place, boxes = _shares_of(record), read_boxes(files.join(self.path, "Annotations", f"{image}.xml"), image)
            sentences = _Sentences(files.join(self.path, "Sentences", f"{image}.txt"))
        except ValueError as error:
            return Problem(record.key, "", "source", str(error), captions=len(record.captions))
        found = {entity: np.flatnonzero((overlaps(place, held) >= self.iou).any(1)).tolist() for entity, held in boxes.items()}
        return replace(record, captions=[sentences.annotated(caption, found) for caption in record.captions])


class _Sentences:
    """The sentences of an image, by their letters and digits."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.of: dict[str, list[Phrase]] = {}
        self.faults: dict[str, str] = {}
        lines = [line for line in read_file(uri).decode(errors="replace").splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            try:
                text, phrases = read_sentence(line)
            except ValueError as error:
                self.faults[_letters(re.sub(r"/EN#\S+", "", line))[0]] = f"{uri} line {number}: {error}"
                continue
            places = np.cumsum([0, *(c.isalnum() for c in text)]).tolist()
            self.of[_letters(text)[0]] = [(entity, places[start], places[end]) for entity, start, end in phrases]

    def annotated(self, caption: Caption, regions: Mapping[str, list[int]]) -> Caption:
        """The caption with `entities`, those that a sentence names several times once; unread when it is no sentence."""
        letters, places = _letters(caption.text)
        if letters not in self.of:
            reason = self.faults.get(letters, f"caption {caption.id} is none of the sentences of {self.uri}")
            return replace(caption, text="", unread=caption.unread or reason)
        spans: dict[str, list[list[int]]] = {}
        for entity, first, last in self.of[letters]:
            if entity != NOT_VISUAL and last > first:
                spans.setdefault(entity, []).append([places[first], places[last - 1] + 1])
        entities = [{"entity": entity, "spans": held, "regions": regions.get(entity, [])} for entity, held in spans.items()]
        return replace(caption, meta=caption.meta | {"entities": entities})


def image_number(name: str) -> str:
    """`flickr30k_000000065567.npz` and `65567.jpg` -> `65567`. Raises ValueError for a name that does not end in digits."""
    digits = re.search(r"(\d+)$", PurePosixPath(name).stem)
    if digits is None:
        raise ValueError(f"image {name!r} does not end in the digits of a Flickr30k id, by which its annotation is found")
    return digits[1].lstrip("0") or "0"


def read_sentence(line: str) -> tuple[str, list[Phrase]]:
    """A marked sentence -> its words without marks, and its phrases in order. Raises ValueError for markup that is none."""
    text, phrases, end = "", list[Phrase](), 0
    for mark in _PHRASE.finditer(line):
        text += line[end : mark.start()]
        phrases.append((mark[1], len(text), len(text) + len(mark[2])))
        text, end = text + mark[2], mark.end()
    text += line[end:]
    if left := re.search(r"[\[\]]|/EN#", text):
        raise ValueError(f"unreadable markup near {text[max(0, left.start() - 10) : left.start() + 20]!r}, wanted [/EN#1/type words]")
    return text, phrases


def read_boxes(uri: str, image: str) -> Boxes:
    """The boxes of an image's entities; entities without one are not in it. Raises ValueError naming the file and what is wrong in it."""
    try:
        root = ElementTree.fromstring(read_file(uri))
        named = root.findtext("filename")
        if named is not None and image_number(named) != image:
            raise ValueError(f"{uri} is the annotation of {named}: the files are swapped")
        size = np.array([float(root.findtext(f"size/{side}") or "") for side in ("width", "height")] * 2)
        found: dict[str, list[list[float]]] = {}
        for thing in root.iter("object"):
            box = thing.find("bndbox")
            if box is not None:
                corners = [float(box.findtext(corner) or "") for corner in ("xmin", "ymin", "xmax", "ymax")]
                for name in thing.findall("name"):
                    found.setdefault((name.text or "").strip(), []).append(corners)
    except ElementTree.ParseError as error:
        raise ValueError(f"{uri} is no XML: {error}") from None
    except ValueError as error:
        raise ValueError(str(error) if uri in str(error) else f"{uri}: a size or corner of a box is no number ({error})") from None
    if not (size > 0).all():
        raise ValueError(f"{uri}: the image has no size ({size[0]:g} x {size[1]:g})")
    return {entity: np.array(corners) / size for entity, corners in found.items()}


def overlaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N,K) intersection over union of boxes (N,4) and (K,4), x1 y1 x2 y2; 0 where both are without area."""
    low, high = np.maximum(one[:, None, :2], other[None, :, :2]), np.minimum(one[:, None, 2:], other[None, :, 2:])
    common = (high - low).clip(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(-1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _shares_of(record: Record) -> np.ndarray:
    regions = record.regions
    if not isinstance(regions, Regions) or regions.boxes is None or not (regions.width and regions.height):
        raise ValueError("its regions have no boxes, or no size of the image, to compare with those of the entities")
    return regions.boxes.astype(np.float64) / np.array([regions.width, regions.height] * 2)


def _letters(text: str) -> tuple[str, Sequence[int]]:
    """Letters and digits in lower case, and where each stands."""
    places = [place for place, c in enumerate(text) if c.isalnum()]
    return "".join(text[place].lower()[:1] for place in places), places
