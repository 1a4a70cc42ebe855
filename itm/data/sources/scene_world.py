"""The worlds of scenes: which objects exist, what a scene is, and its number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RELATIONS = ("left", "above")
SLOTS = 5  # colour A, shape A, colour B, shape B, relation
MIXED_KINDS = ("full", "full", "drop1", "drop2", "norel")


class Form(TypedDict):
    """A logical form with names: colour and shape of the objects A and B, and their relation; None = unspecified."""

    a: list[str | None]
    b: list[str | None]
    relation: str | None


@dataclass(frozen=True)
class World:
    """colours x shapes objects, two a scene, and the kinds of its captions; sizes = images by split."""

    name: str
    colours: int
    shapes: int
    kinds: tuple[str, ...]
    sizes: tuple[int, int, int]

    @property
    def objects(self) -> int:
        return self.colours * self.shapes

    @property
    def scenes(self) -> int:
        return 2 * self.objects**2

    @property
    def radices(self) -> tuple[int, int, int, int, int]:
        """How many values each slot has."""
        return (self.colours, self.shapes, self.colours, self.shapes, 2)

    def all_scenes(self) -> np.ndarray:
        """(scenes, 5) int64: the slots of every scene, row number = scene id."""
        return np.stack(np.unravel_index(np.arange(self.scenes), self.radices), 1)

    def scene_id(self, slots: np.ndarray) -> int:
        return int(np.ravel_multi_index(tuple(slots), self.radices))


WORLDS = {
    "main": World("main", 6, 6, MIXED_KINDS, (3000, 500, 1000)),
    "equiv": World("equiv", 4, 4, ("full",) * 5, (1500, 300, 600)),
    "small": World("small", 3, 3, ("full",) * 5, (1500, 300, 600)),
    "tiny": World("tiny", 4, 4, MIXED_KINDS, (200, 50, 50)),
}


def world_named(name: str) -> World:
    """Raises ValueError naming the known worlds."""
    if name not in WORLDS:
        raise ValueError(f"unknown world {name!r}; known: {', '.join(WORLDS)}")
    return WORLDS[name]


def form_of(slots: np.ndarray) -> Form:
    """Slots (5,) with -1 = unspecified -> a JSON-able logical form with names."""
    ca, sa, cb, sb, r = (int(s) for s in slots)
    name = lambda names, k: None if k < 0 else names[k]
    return {
        "a": [name(COLOURS, ca), name(SHAPES, sa)],
        "b": [name(COLOURS, cb), name(SHAPES, sb)],
        "relation": name(RELATIONS, r),
    }


def slots_of(form: Form) -> np.ndarray:
    """The inverse of `form_of`: (5,) int64, -1 = unspecified."""
    position = lambda names, name: -1 if name is None else names.index(name)
    objects = [position(names, name) for thing in (form["a"], form["b"]) for names, name in zip((COLOURS, SHAPES), thing, strict=True)]
    return np.array([*objects, position(RELATIONS, form["relation"])], np.int64)
