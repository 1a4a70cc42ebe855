"""Image teachers that average a grid: EfficientNet-Lite0, and the region features that shards hold already."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from itm.data import files
from itm.data.pixels import decode
from itm.data.preprocess import fit
from itm.data.records import Regions
from itm.data.shards import Sample
from itm.device import send
from itm.matchers.encoders.efficientnet import WIDTH, EfficientNetLite0
from itm.matchers.weights import tensors_sha256
from itm.packaged import EFFICIENTNET, version_of
from itm.teachers.identity import Modality, Teacher, VectorTeacher
from itm.teachers.image import image_bytes
from itm.types import Images

SIZE = 224


class Centre:
    """What is subtracted from each vector: a .npy file of one vector, such as the mean.npy that `itm features` writes; None = nothing.

    Features behind a ReLU are never negative, so that all their cosines are high; without their mean those of different photos are about 0.
    """

    def __init__(self, uri: str | None, width: int | None = None) -> None:
        """Raises ValueError for a file that holds no vector of `width` finite numbers (None = of any width)."""
        self.vector, self.sha256 = np.zeros((), np.float32), None
        if uri is None:
            return
        data = files.read_bytes(files.absolute(uri))
        try:
            self.vector = np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)
        except Exception as error:  # numpy raises almost anything for what is no array
            raise ValueError(f"option centre: {uri} is no .npy file of numbers: {error}") from None
        if self.vector.ndim != 1 or (width is not None and len(self.vector) != width) or not np.isfinite(self.vector).all():
            raise ValueError(f"option centre: {uri} must hold one vector of {width or 'D'} finite numbers, not {self.vector.shape}")
        self.sha256 = hashlib.sha256(self.vector.tobytes()).hexdigest()

    def of(self, vectors: np.ndarray) -> np.ndarray:
        return vectors - self.vector


def _pixels(sample: Sample, crop: str) -> bytes:
    return fit(decode(image_bytes(sample)), SIZE, crop).tobytes()


class EfficientNetTeacher(Teacher):
    """EfficientNet-Lite0 (ImageNet): the mean of its 7 x 7 cells, 1280 wide. It works without a network."""

    modality: Modality = "image"
    width = WIDTH

    def __init__(self, crop: str = "squash", centre: str | None = None) -> None:
        """crop: squash = all of a photo, center = a square of it. Raises ValueError where the extra `real` is missing."""
        if crop not in ("squash", "center"):
            raise ValueError(f"crop {crop!r}; known: squash, center")
        self.centre = Centre(centre, WIDTH)
        self.module = EfficientNetLite0(cells=1, freeze=True).eval()
        self.prepare = partial(_pixels, crop=crop)
        self.identity = {
            "kind": "efficientnet_lite0",
            "model": "efficientnet-lite0",
            "revision": version_of(EFFICIENTNET),
            "weights_sha256": tensors_sha256(self.module),
            "pooling": "mean of 7x7 cells",
            "width": WIDTH,
            "dtype": "fp32",
            "preprocessing": {"version": 1, "size": SIZE, "crop": crop, "pixels": "(x - 127) / 128", "centre": self.centre.sha256},
        }

    @torch.inference_mode()
    def embed(self, payloads: Sequence[bytes]) -> np.ndarray:
        """payloads: (224,224,3) uint8 bytes each -> (N, 1280) float32."""
        assert self.module is not None
        raw = np.stack([np.frombuffer(p, np.uint8) for p in payloads]).reshape(len(payloads), SIZE, SIZE, 3)
        pixels = send(torch.from_numpy(raw), self.device).permute(0, 3, 1, 2)
        found = self.module(Images(torch.arange(len(payloads), device=self.device), pixels=pixels)).vector
        return self.centre.of(found.float().cpu().numpy())


def _mean_of_regions(sample: Sample, centre: Centre) -> bytes:
    if sample.regions is None:
        raise ValueError(f"{sample.key}: no region file; this teacher averages region features")
    held = Regions.from_npz(sample.regions).features.astype(np.float32)
    if not np.isfinite(held).all():
        raise ValueError(f"{sample.key}: its region features are not all finite")
    if centre.vector.ndim and held.shape[1] != len(centre.vector):
        raise ValueError(f"{sample.key}: its region features are {held.shape[1]} wide, option centre is {len(centre.vector)}")
    return centre.of(held.mean(0)).tobytes()


class RegionMeanTeacher(VectorTeacher):
    """The mean of the region features that a shard holds, whoever made them: no model runs, and nothing is decoded."""

    modality: Modality = "image"

    def __init__(self, width: int, centre: str | None = None) -> None:
        """width: of the region features."""
        held = Centre(centre, width)
        self.width = width
        self.prepare = partial(_mean_of_regions, centre=held)
        self.identity = {
            "kind": "region_mean",
            "model": "mean-of-regions",
            "revision": "1",
            "weights_sha256": None,
            "width": width,
            "dtype": "fp32",
            "preprocessing": {"version": 1, "centre": held.sha256},
        }
