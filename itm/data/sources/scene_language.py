"""The language of scenes: captions with logical forms, which caption holds for which scene, and the exact teachers that follow.

A logical form fixes the slots (colour A, shape A, colour B, shape B, relation); an unspecified slot admits every value.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from itm.data.formats import Json
from itm.data.sources.scene_world import Form, World, form_of, slots_of, world_named

_WORDS = {
    "red": ("red", "crimson"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "orange": ("orange", "amber"),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "star": ("star", "asterisk"),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus"),
    None: ("shape", "thing", "object"),
}
# Each relation as said of (A, B), and its converse as said of (B, A).
_PHRASES = {
    "left": (("left of", "to the left of", "on the left side of"), ("right of", "to the right of", "on the right side of")),
    "above": (("above", "over", "higher than"), ("below", "under", "lower than")),
    None: (("and", "next to", "together with"), ("and", "next to", "together with")),
}
_FRAMES = ("{} {} {}", "there is {} {} {}", "{} is {} {}", "a picture of {} {} {}")
_PLAIN_FRAMES = ("{} {} {}", "there is {} {} {}", "a picture of {} {} {}", "an image of {} {} {}")
_DROPPED = {"full": 0, "norel": 0, "drop1": 1, "drop2": 2}


def caption_slots(scene: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The slots of a caption of a `kind`: drop1/drop2 leave one/two attributes unspecified, norel the relation."""
    slots = scene.copy()
    slots[rng.choice(4, _DROPPED[kind], replace=False)] = -1
    if kind == "norel":
        slots[4] = -1
    return slots


def say(slots: np.ndarray, rng: np.random.Generator) -> str:
    """One of the many ways to say a logical form."""
    form = form_of(slots)
    first, second = _noun(form["a"], rng), _noun(form["b"], rng)
    swapped = int(rng.integers(2))
    if swapped:
        first, second = second, first
    phrase = _pick(_PHRASES[form["relation"]][swapped], rng)
    frame = _pick(_FRAMES if form["relation"] else _PLAIN_FRAMES, rng)
    return frame.format(first, phrase, second)


def holds(scenes: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """(I,5) scenes x (T,5) caption slots -> (I,T) bool: the caption is true of the scene.

    With a relation, A and B are fixed by it; without one, either of the two objects may be A.
    """
    as_said = _agree(scenes, captions, (0, 1, 2, 3, 4))
    return as_said | (_agree(scenes, captions, (2, 3, 0, 1, 4)) & (captions[:, 4] < 0))


def relevance(images: list[Json], captions: list[Json]) -> np.ndarray:
    """(I,T) bool, exact. images: sample metas with `scene`; captions: caption metas with `form`."""
    return holds(np.stack([_slots(m, "scene") for m in images]), np.stack([_slots(m, "form") for m in captions]))


def scene_truth_image(meta: Json) -> np.ndarray:
    """Unit vector float32 of a sample meta: one one-hot block a slot, so the cosine of two images is their share of equal slots."""
    radices, slots = world_named(str(meta["world"])).radices, _slots(meta, "scene")
    vector = np.zeros(sum(radices), np.float32)
    vector[np.cumsum((0, *radices[:-1])) + slots] = len(slots) ** -0.5
    return vector


def scene_truth_caption(meta: Json) -> np.ndarray:
    """Unit vector float32 of a caption meta: indicator of the scenes of its world for which it holds.

    The cosine of two captions is |both| / sqrt(|one| |other|): 1 for the same meaning, and the Jaccard index for sets of equal
    size without overlap or with full overlap, as in the equivalence world.
    """
    indicator = holds(world_named(str(meta["world"])).all_scenes(), _slots(meta, "form")[None])[:, 0].astype(np.float32)
    return indicator / np.linalg.norm(indicator)


def _slots(meta: Json, name: str) -> np.ndarray:
    return slots_of(cast(Form, meta[name]))


def caption_meta(world: World, kind: str, slots: np.ndarray) -> Json:
    return {"world": world.name, "kind": kind, "form": form_of(slots)}


def _agree(scenes: np.ndarray, captions: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    agree = np.ones((len(scenes), len(captions)), bool)
    for slot, other in enumerate(order):
        agree &= (captions[None, :, slot] < 0) | (captions[None, :, slot] == scenes[:, None, other])
    return agree


def _noun(thing: list[str | None], rng: np.random.Generator) -> str:
    colour, shape = thing
    words = [_pick(_WORDS[colour], rng)] if colour else []
    words.append(_pick(_WORDS[shape], rng))
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
