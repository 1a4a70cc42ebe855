"""Several random crops of each image, every one with a vector of its own: the views of an image teacher."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from itm.config import Part
from itm.data.pixels import decode
from itm.data.preprocess import draw, random_box
from itm.data.records import Caption
from itm.data.shards import Sample
from itm.teachers.identity import Modality, Teacher, build_teacher
from itm.teachers.image import image_bytes

_CROPS = "random-1"  # raise the number when random_box or draw changes


class ViewsTeacher(Teacher):
    """`count` random crops of an image, drawn as training draws them, each given to the teacher `of` as an image of its own.

    Crop k of an image depends on (seed, k, key) alone, so training can cut the same one again (`teachers.views: one`). flip: half of the
    crops are mirrored. Raises ValueError for a teacher that is not of images, or that has views already.
    """

    modality: Modality = "image"

    def __init__(self, of: Mapping[str, Any], count: int = 4, seed: int = 0, flip: bool = False) -> None:
        if count < 2:
            raise ValueError(f"teacher 'views': count {count}; one view is the teacher {of.get('kind')!r} itself, so give 2 or more")
        self.of = build_teacher(Part.model_validate(of), "image")
        if self.of.views > 1:
            raise ValueError("teacher 'views': its teacher gives several views of each image already")
        self.views, self.width, self.module = count, self.of.width, self.of.module
        self.prepare = partial(_views_payload, prepare=self.of.prepare, count=count, seed=seed, flip=flip)
        self.identity = {
            "kind": "views",
            "model": f"{count}-{self.of.identity['kind']}-{self.of.identity['model']}",
            "seed": seed,
            "flip": flip,
            "crops": _CROPS,
            "width": self.width,
            "of": self.of.identity,
        }

    def to(self, device: Any) -> Teacher:
        self.of.to(device)
        self.device = self.of.device
        return self

    def embed(self, payloads: Sequence[bytes]) -> np.ndarray:
        """payloads: all views of an image each -> (N * views, D), the views of an image in neighbouring rows."""
        return self.of.embed([view for payload in payloads for view in _apart(payload)])


def _views_payload(sample: Sample | Caption, prepare: Callable[[Any], bytes], count: int, seed: int, flip: bool) -> bytes:
    """Each crop as a square BMP, which costs no compression, through the teacher's own preparation; lengths before them."""
    assert isinstance(sample, Sample)
    picture = decode(image_bytes(sample))
    views = []
    for view in range(count):
        numbers = draw(seed, view, sample.key)
        box = random_box(*picture.size, numbers)
        side = max(1, round(max(box[2] - box[0], box[3] - box[1])))
        crop = picture.resize((side, side), Image.Resampling.BICUBIC, box=box)
        out = io.BytesIO()
        (ImageOps.mirror(crop) if flip and numbers.mirror < 0.5 else crop).save(out, "BMP")
        views.append(prepare(replace(sample, image=out.getvalue())))
    return np.array([count, *map(len, views)], np.int64).tobytes() + b"".join(views)


def _apart(payload: bytes) -> list[bytes]:
    count = int(np.frombuffer(payload, np.int64, 1)[0])
    ends = np.cumsum(np.frombuffer(payload, np.int64, count, 8)) + 8 * (count + 1)
    return [payload[start:end] for start, end in zip([8 * (count + 1), *ends[:-1]], ends, strict=True)]
