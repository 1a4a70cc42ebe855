"""The shuffled control: true teacher vectors on the wrong images. A method that gains as much from it has learnt no meaning.

One permutation per seed and split, without a fixed point, over IMAGES: image i gets the vector of image pi(i), and the captions of
image i get those of the captions of pi(i), the same ordinal (modulo their number). So both modalities are wrong in the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from itm.config import Part, Recipe, Strict
from itm.data.formats import Json
from itm.data.shards import Manifest
from itm.data.sidecar import Sidecar, Store

SHUFFLED = "shuffled"


class Shuffle(Strict):
    """Options of the part `shuffled`: the teacher whose vectors are handed round, and the seed of the permutation."""

    of: Part
    seed: int = 0


@dataclass(frozen=True)
class ShuffledRows:
    """What the sidecar of one shard holds; rows in tar order."""

    keys: list[str]
    captions: list[str] | None
    vectors: np.ndarray
    problems: list[str | None]


def shuffle_of(part: Part) -> Shuffle:
    """Raises ValueError naming the wrong option."""
    try:
        return Shuffle.model_validate(part.options)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ValueError(f"teacher 'shuffled', option {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}; options: of, seed") from None


def control_of(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with the shuffled control of each of its teachers in the teacher's place, and nothing else changed.

    Raises ValueError when a teacher is a control already.
    """
    controls = {}
    for modality in ("image", "text"):
        part: Part | None = getattr(recipe.teachers, modality)
        if part is not None and part.kind == SHUFFLED:
            raise ValueError(f"teachers.{modality} is the shuffled control already: leave --shuffled out, or name the teacher itself")
        if part is not None:
            controls[modality] = Part(kind=SHUFFLED, options={"of": part.model_dump(exclude_defaults=True), "seed": seed})
    return recipe.model_copy(update={"teachers": recipe.teachers.model_copy(update={**controls, "online": []})})


def shuffled_identity(base: Mapping[str, object], seed: int, manifest: Manifest) -> Json:
    """Depends on the shards too: they decide who can be exchanged with whom."""
    model = f"{base['kind']}-seed{seed}".replace("_", "-")
    return {"kind": SHUFFLED, "model": model, "seed": seed, "shards": manifest.fingerprint(), "of": dict(base)}


def shuffled_rows(base: Store, manifest: Manifest, seed: int, wanted: Iterable[str]) -> Iterator[tuple[str, ShuffledRows]]:
    """(shard name, rows) of the wanted shards. Rows that the base teacher could not score stay without a vector.

    Raises ValueError when fewer than two images have vectors.
    """
    sidecars = {shard.name: base.sidecar(shard.name, shard.sha256) for shard in manifest.shards}
    images = {(name, key): rows for name, sidecar in sidecars.items() for key, rows in _rows_by_image(sidecar).items()}
    donors = _donors({image: rows[sidecars[image[0]].ok[rows]] for image, rows in images.items()}, seed)
    for name in wanted:
        mine = sidecars[name]
        vectors = np.zeros(mine.vectors.shape, np.float32)
        for key, rows in _rows_by_image(mine).items():
            (shard, _), their_rows = donors[name, key]
            vectors[rows] = sidecars[shard].vectors[their_rows[np.arange(len(rows)) % len(their_rows)]]
        yield name, ShuffledRows(mine.keys, mine.captions, vectors, mine.problems)


_Image = tuple[str, str]  # shard name, sample key


def _donors(usable_rows: dict[_Image, np.ndarray], seed: int) -> dict[_Image, tuple[_Image, np.ndarray]]:
    """image -> (the image whose vectors it gets, the rows of those): the next image with any, along one cycle through all.

    The cycle is the order of hashes of (seed, shard, key): the same for both modalities and for every version of numpy.
    """
    cycle = sorted(usable_rows, key=lambda image: hashlib.blake2b(f"{seed}/{image[0]}/{image[1]}".encode()).digest())
    if sum(len(rows) > 0 for rows in usable_rows.values()) < 2:
        raise ValueError("a shuffled teacher needs at least two images with vectors")
    donors: dict[_Image, tuple[_Image, np.ndarray]] = {}
    following = None  # the nearest image with vectors behind the one that is looked at
    for image in [*reversed(cycle), *reversed(cycle)]:  # backwards, and round a second time: the last images follow on the first
        if following is not None and following != image:
            donors[image] = (following, usable_rows[following])
        if len(usable_rows[image]):
            following = image
    return donors


def _rows_by_image(sidecar: Sidecar) -> dict[str, np.ndarray]:
    """Sample key -> its row numbers. Caption rows of a sample are neighbours, and no key occurs in two runs."""
    keys = np.asarray(sidecar.keys, dtype=object)
    if not len(keys):
        return {}
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return {keys[start]: np.arange(start, end) for start, end in zip(starts, [*starts[1:], len(keys)], strict=True)}
