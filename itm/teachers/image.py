"""Image teachers: any Hugging Face vision model, weight-free image statistics, and the ground truth of scenes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from itm.data.formats import Json
from itm.data.pixels import decode, resized
from itm.data.shards import Sample
from itm.device import send
from itm.teachers.identity import Modality, Precision, Teacher, VectorTeacher
from itm.teachers.pretrained import OF_THE_OUTPUT, check_pooling, layer_of, load_hf, model_identity, pooled

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Pooling = Literal["cls", "mean", "pooler", "patches", "joint"]


def image_bytes(sample: Sample) -> bytes:
    if sample.image is None:
        raise ValueError(f"{sample.key}: no image bytes; this teacher cannot score precomputed regions")
    return sample.image


@dataclass(frozen=True)
class PixelPreparer:
    """Resize and crop as a model's own image processor does, with PIL; (H,W,3) uint8 bytes.

    shortest: the short side is scaled to it, aspect kept; else the image is squashed to `size` (height, width). `crop`
    (height, width) is then cut from the centre.
    """

    shortest: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int = int(Image.Resampling.BICUBIC)

    def __call__(self, sample: Sample) -> bytes:
        image = decode(image_bytes(sample))
        width, height = image.size
        if self.shortest:
            short = min(width, height)
            width, height = (self.shortest if side == short else int(self.shortest * side / short) for side in (width, height))
        elif self.size:
            height, width = self.size
        cut = None
        if self.crop:
            left, top = (width - self.crop[1]) // 2, (height - self.crop[0]) // 2
            cut = (left, top, left + self.crop[1], top + self.crop[0])
        return resized(image, (width, height), cut, Image.Resampling(self.resample)).tobytes()

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of every prepared image."""
        shape = self.crop or self.size
        assert shape is not None
        return shape


class HFVisionTeacher(Teacher):
    """Any Hugging Face vision model (or the vision tower of a pair), its layer and pooling chosen.

    layer: -1 is the model's final output, k the k-th entry of its hidden states (negative ones from the end). pooling: `cls` the first
    token, `mean` of the patch tokens, `pooler` the model's pooled output, `patches` all patch tokens flattened in raster order
    (position-sensitive, wide: CUSA's published image features are such a trunk output, docs/methods/cusa.md#teachers), `joint` the vector
    that a pair of an image and a text model compares with captions. Preparation follows the model's preprocessor_config.json; without
    one: short side bicubic, centre crop, mean and deviation of CLIP (docs/methods/cusa.md#images).
    """

    modality: Modality = "image"

    def __init__(
        self, path: str, pooling: Pooling = "cls", layer: int = -1, revision: str | None = None, precision: Precision = "fp32"
    ) -> None:
        check_pooling(pooling, get_args(Pooling), layer)
        whole = load_hf(path, revision, precision, pooler=pooling in OF_THE_OUTPUT)
        tower = getattr(whole, "vision_model", whole)
        if pooling == "joint" and not hasattr(whole, "get_image_features"):
            raise ValueError(
                f"teacher path {path!r} holds no pair of an image and a text model; choose pooling cls, mean, pooler or patches"
            )
        self.module = whole if pooling == "joint" else tower
        self.pooling, self.layer, self.precision = pooling, layer, precision
        settings = _processor_settings(path, revision)
        self.pixels, mean, std = _preparation(settings, _image_size(tower.config))
        self.prepare = self.pixels
        self._scale = torch.tensor([[255.0] * 3, list(mean), list(std)], dtype=torch.float32)
        self.width = self.embed([bytes(3 * self.pixels.shape[0] * self.pixels.shape[1])]).shape[1]
        self.identity = model_identity(path, self.module, revision) | {
            "kind": "hf_vision",
            "layer": layer,
            "pooling": pooling,
            "width": self.width,
            "dtype": precision,
            "preprocessing": {"version": 1, **asdict(self.pixels), "mean": list(mean), "std": list(std)},
        }

    @torch.inference_mode()
    def embed(self, payloads: Sequence[bytes]) -> np.ndarray:
        """payloads: (H,W,3) uint8 bytes each -> (N, D) float32."""
        assert self.module is not None
        raw = np.stack([np.frombuffer(p, np.uint8) for p in payloads]).reshape(len(payloads), *self.pixels.shape, 3)
        scale, mean, std = send(self._scale, self.device)[:, :, None, None]
        # Bytes travel, a quarter of float32. The scale is a tensor: by a number, a GPU would multiply with its rounded inverse.
        pixels = (send(torch.from_numpy(raw), self.device).permute(0, 3, 1, 2).contiguous() / scale - mean) / std
        pixels = pixels.to(next(self.module.parameters()).dtype)
        if self.pooling == "joint":
            return pooled(cast(Any, self.module).get_image_features(pixel_values=pixels)).float().cpu().numpy()
        output = self.module(pixel_values=pixels, output_hidden_states=self.layer != -1)
        return self._pool(output).flatten(1).float().cpu().numpy()

    def _pool(self, output: Any) -> Tensor:
        if self.pooling == "pooler":
            if output.get("pooler_output") is None:
                raise ValueError("this vision model has no pooled output; choose pooling cls, mean or patches")
            return output.pooler_output
        hidden = layer_of(output, self.layer)
        if hidden.dim() == 4:  # a convolutional map (N,C,h,w)
            hidden, prefix = hidden.flatten(2).transpose(1, 2), 0
        else:
            prefix = hidden.shape[1] - _patches(getattr(self.module, "config", None), self.pixels.shape)
        if self.pooling == "cls":
            if prefix < 1:
                raise ValueError("this vision model has no class token; choose pooling mean, pooler or patches")
            return hidden[:, 0]
        return hidden[:, prefix:].mean(1) if self.pooling == "mean" else hidden[:, prefix:]


def _patches(config: Any, shape: tuple[int, int]) -> int:
    patch = config.patch_size if isinstance(config.patch_size, (tuple, list)) else (config.patch_size, config.patch_size)
    return (shape[0] // patch[0]) * (shape[1] // patch[1])


def _image_size(config: Any) -> int:
    size = getattr(config, "image_size", 224)
    return int(size[0] if isinstance(size, (tuple, list)) else size)


def _processor_settings(path: str, revision: str | None) -> Mapping[str, Any]:
    from transformers.utils import cached_file

    found = cached_file(path, "preprocessor_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return {}
    with open(found, encoding="utf-8") as file:
        return json.load(file)


def _preparation(settings: Mapping[str, Any], image_size: int) -> tuple[PixelPreparer, Sequence[float], Sequence[float]]:
    """Pixel preparation, mean and deviation that an image processor's settings ask for."""
    if not settings:
        return PixelPreparer(image_size, None, (image_size, image_size)), CLIP_MEAN, CLIP_STD
    size = settings.get("size", image_size)
    crop = _height_width(settings.get("crop_size", image_size)) if settings.get("do_center_crop") else None
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size if crop else None
    if shortest and crop is None:
        crop = (shortest, shortest)  # batches need one shape
    resample = settings.get("resample")
    preparer = PixelPreparer(
        shortest, None if shortest else _height_width(size), crop, int(Image.Resampling.BICUBIC if resample is None else resample)
    )
    if settings.get("do_normalize") is False:
        return preparer, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return preparer, settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        return (side, side) if side else (size["height"], size["width"])
    return size, size


_BINS = (12, 4, 4)


def hsv_pyramid(image: Image.Image, size: int) -> np.ndarray:
    """(1536,) float32: square roots of HSV histograms (12 x 4 x 4 bins) of the whole image, its quarters and three strips.

    Each histogram sums to one before the root, so a dot product of two is their Bhattacharyya coefficient. The image is
    squashed to size x size (bilinear) first.
    """
    hsv = np.asarray(resized(image, (size, size), resample=Image.Resampling.BILINEAR).convert("HSV"), np.uint16)
    hue, saturation, value = (hsv[..., c] * bins // 256 for c, bins in enumerate(_BINS))
    codes = (hue * _BINS[1] + saturation) * _BINS[2] + value
    half, third = size // 2, size // 3
    cells = [codes, codes[:half, :half], codes[:half, half:], codes[half:, :half], codes[half:, half:]]
    cells += [codes[:third], codes[third : 2 * third], codes[2 * third :]]
    counts = [np.bincount(cell.ravel(), minlength=int(np.prod(_BINS))) / cell.size for cell in cells]
    return np.sqrt(np.concatenate(counts)).astype(np.float32)


def _statistics_payload(sample: Sample, size: int) -> bytes:
    return hsv_pyramid(decode(image_bytes(sample)), size).tobytes()


class StatisticsTeacher(VectorTeacher):
    """Colour statistics: no weights, no fitting, deterministic. Ranks photos above chance, but is no semantic teacher."""

    modality: Modality = "image"
    width = 8 * 12 * 4 * 4

    def __init__(self, size: int = 128) -> None:
        """size: side in pixels to which images are squashed; at least 8."""
        if size < 8:
            raise ValueError(f"size {size} is too small for the pyramid; at least 8")
        self.prepare = partial(_statistics_payload, size=size)
        self.identity = {
            "kind": "statistics",
            "model": "hsv-pyramid",
            "revision": "1",
            "weights_sha256": None,
            "pooling": "1 + 2x2 + 3 strips, square root",
            "width": self.width,
            "dtype": "fp32",
            "preprocessing": {"version": 1, "size": size, "resample": "bilinear squash"},
        }


def scene_world_of(meta: Json, world: str, where: str) -> None:
    """Raises ValueError unless `meta` is of a scene of `world`."""
    if meta.get("world") != world:
        raise ValueError(f"{where} is of the world {meta.get('world')!r}, the teacher knows the truth of {world!r}: set its option `world`")


def _scene_payload(sample: Sample, world: str) -> bytes:
    from itm.data.sources.scenes import scene_truth_image

    scene_world_of(sample.meta, world, f"sample {sample.key!r}")
    return scene_truth_image(sample.meta).tobytes()


class ScenesImageTruth(VectorTeacher):
    """GROUND TRUTH of scenes, not a model: one one-hot block a slot; the cosine of two images is their share of equal slots."""

    modality: Modality = "image"

    def __init__(self, world: str = "equiv") -> None:
        from itm.data.sources.scene_world import world_named

        self.width = sum(world_named(world).radices)
        self.prepare = partial(_scene_payload, world=world)
        self.identity = {"kind": "scenes_image", "model": f"ground-truth-{world}", "revision": "1", "width": self.width, "dtype": "fp32"}
