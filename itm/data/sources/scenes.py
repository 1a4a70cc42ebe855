"""Scenes: a synthetic compositional world that is unlimited, reproducible, and knows which caption holds for which image.

A scene is two coloured shapes and one relation. Worlds: `main` (6 x 6, five kinds of captions: for comparing methods), `equiv`
(4 x 4, full captions only: similarity is relevance, for judging soft labels), `small` (3 x 3 of the same: 162 scenes, so that most
pairs of a batch of 128 meet another of their scene), `tiny` (4 x 4, 300 images: plumbing).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from itm.data.formats import Json
from itm.data.records import Caption, Record, Regions
from itm.data.sources import scene_render as draw
from itm.data.sources.scene_language import caption_meta, caption_slots, relevance, say, scene_truth_caption, scene_truth_image
from itm.data.sources.scene_world import World, form_of, world_named
from itm.data.sources.source import Source

__all__ = ["Scenes", "relevance", "scene_truth_caption", "scene_truth_image"]

_STATISTICS_IMAGES = 256
_VERSION = 1  # raise it when the same seed would give other records


class Scenes(Source):
    """`regions=True` adds six regions (358-d, standardised on 256 scenes of the same world) to every image."""

    splits = ["train", "val", "test"]
    relevance = staticmethod(relevance)

    def __init__(
        self,
        world: str = "main",
        seed: int = 0,
        n_train: int | None = None,
        n_val: int | None = None,
        n_test: int | None = None,
        regions: bool = False,
    ) -> None:
        self.world, self.seed, self.regions = world_named(world), seed, regions
        given = zip(self.splits, (n_train, n_val, n_test), self.world.sizes, strict=True)
        self.sizes = {split: size if chosen is None else chosen for split, chosen, size in given}

    def count(self, split: str) -> int:
        return self.sizes[split]

    def identity(self) -> Json:
        return {
            "source": "scenes",
            "version": _VERSION,
            "world": self.world.name,
            "seed": self.seed,
            "sizes": self.sizes,
            "regions": self.regions,
        }

    def item(self, split: str, index: int) -> Record:
        """A pure function of (world, seed, split, index)."""
        rng = np.random.default_rng((self.seed, self.splits.index(split), index))
        slots = np.array([rng.integers(n) for n in self.world.radices])
        picture, boxes = draw.render(slots, rng)
        key = f"scene-{split}-{index:06d}"
        captions = [self._caption(f"{key}-{n}", slots, kind, rng) for n, kind in enumerate(self.world.kinds)]
        meta = {
            "image_id": key,
            "world": self.world.name,
            "scene_id": self.world.scene_id(slots),
            "scene": form_of(slots),
            "boxes": (boxes * draw.SIDE).round(2).tolist(),
        }
        regions = self._regions(picture, draw.propose(boxes, rng)) if self.regions else None
        return Record(key, split, captions, draw.to_png(picture), "png", regions, meta)

    def _caption(self, caption_id: str, slots: np.ndarray, kind: str, rng: np.random.Generator) -> Caption:
        said = caption_slots(slots, kind, rng)
        return Caption(caption_id, say(said, rng), caption_meta(self.world, kind, said))

    def _regions(self, picture: np.ndarray, boxes: np.ndarray) -> Regions:
        mean, deviation = _statistics(self.world, self.seed)
        features = ((draw.describe(picture, boxes) - mean) / deviation).astype(np.float16)
        pixels = (boxes * draw.SIDE).astype(np.float32)
        return Regions(features, pixels, draw.SIDE, draw.SIDE, np.ones(len(boxes), np.float32))


@lru_cache(maxsize=8)
def _statistics(world: World, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (358,) of the raw region features of scenes drawn for this purpose only, so that any slice of
    a split can be rendered alone. A floor under the deviation keeps histogram bins that hardly ever fill from exploding."""
    rows = []
    for index in range(_STATISTICS_IMAGES):
        rng = np.random.default_rng((seed, 1000, index))
        picture, boxes = draw.render(np.array([rng.integers(n) for n in world.radices]), rng)
        rows.append(draw.describe(picture, draw.propose(boxes, rng)))
    features = np.concatenate(rows)
    return features.mean(0), np.maximum(features.std(0), 0.02)
