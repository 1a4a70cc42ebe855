"""Sets of labelled images without captions, for image retrieval: CUB, SOP, In-Shop, iNaturalist, and one's own by folder or list."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from itm.data import files
from itm.data.formats import Json
from itm.data.sources.label_lists import LAYOUTS, LabelledImage
from itm.data.sources.source import ListedImages, Listing, below


@dataclass(frozen=True)
class _Place:
    """Where a set lies, and in which of `LAYOUTS`."""

    path: str
    layout: str


class Labelled(ListedImages):
    """`sets`: name -> folder or list, or name -> {path, layout}. All sets are one split, `test`: each image knows its set and label.

    A set that is named as a layout (`LAYOUTS`) has that layout; any other is a folder a class, or a list where its path is a file.
    Raises ValueError for a list that is missing or does not fit its set, and for an image that nothing could be found for: a label of
    one image, or a query whose label no image of the gallery has.
    """

    def __init__(self, sets: Mapping[str, str | Mapping[str, str]]) -> None:
        if not sets:
            raise ValueError("data.source.options.sets names no set; write {name: folder}")
        self.sets = {name: _place(name, said) for name, said in sets.items()}
        self.roots: dict[str, str] = {}
        annotations: list[str] = []
        rows: list[Listing] = []
        for name, place in self.sets.items():
            found = LAYOUTS[place.layout](files.absolute(place.path))
            check_answerable(found.images, f"{name} ({files.absolute(place.path)})")
            self.roots[name] = found.root
            annotations += found.lists
            rows += [_listing(name, image) for image in found.images]
        super().__init__("", {"test": rows}, annotations)

    def identity(self) -> Json:
        listed = hashlib.sha256(repr([(row.path, row.meta) for row in self.listings["test"]]).encode()).hexdigest()
        return {"source": "Labelled", "sets": {name: place.layout for name, place in self.sets.items()}, "listed": listed}

    def place_of(self, split: str, row: Listing) -> str:
        name, _, path = row.path.partition("/")
        return below(self.roots[name], path)


def _place(name: str, said: object) -> _Place:
    where = f"data.source.options.sets.{name}"
    if "/" in name or not name:
        raise ValueError(f"{where}: the name of a set holds no slash")
    given: Any = {"path": said} if isinstance(said, str) else said
    if not isinstance(given, Mapping) or not set(given) <= {"path", "layout"} or "path" not in given:
        raise ValueError(f"{where} is a folder, or {{path: ..., layout: ...}}, not {said!r}")
    layout = given.get("layout") or (name if name in LAYOUTS else "folders" if files.is_folder(files.absolute(given["path"])) else "list")
    if layout not in LAYOUTS:
        raise ValueError(f"{where}: unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    return _Place(str(given["path"]), layout)


def _listing(name: str, image: LabelledImage) -> Listing:
    path = f"{name}/{image.path}"
    role = {"role": image.role} if image.role else {}
    return Listing(path, meta={"image_id": path, "set": name, "label": image.label, **role})


def check_answerable(images: list[LabelledImage], where: str) -> None:
    """Raises ValueError, naming `where`, for no image at all, one image listed twice, and questions without an answer."""
    if not images:
        raise ValueError(f"{where}: no image in this set")
    path, times = Counter(image.path for image in images).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{where}: {path} is listed {times} times")
    lost = list(unanswerable((image.label, image.role) for image in images))
    if not lost:
        return
    first = images[lost[0]]
    why = "no gallery image has" if first.role == "query" else "no other image has"
    raise ValueError(
        f"{where}: nothing can be found for {len(lost)} of {len(images)} images; the first is {first.path}, whose label {first.label!r} "
        f"{why}: add one, or take the image out of the list"
    )


def unanswerable(rows: Iterable[tuple[str, str | None]]) -> Iterator[int]:
    """Positions of the images, by label and role, that would be asked and have nothing to find. Without roles every image is asked of
    all others; `query` images are asked of the `gallery`."""
    known = list(rows)
    held = Counter(label for label, role in known if role != "query")
    for place, (label, role) in enumerate(known):
        if role != "gallery" and held[label] < (1 if role == "query" else 2):
            yield place
