"""How raw bytes and strings become model inputs: decode, resize, crop, flip; regions and their box numbers; token ids.

`Inputs` travels with a matcher. Its calls are the evaluation path: exact (PIL bicubic, docs/methods/cusa.md#images) and deterministic.
Training may augment; the random numbers are then a function of (seed, epoch, key), so no generator state has to be saved to resume.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from itm.config import Data
from itm.data.formats import check_format
from itm.data.pixels import MOST, decode, decode_jpeg, jpeg_size, resized
from itm.data.records import Regions
from itm.data.text import load_tokenizer
from itm.types import Captions, Images

FORMAT = 1  # of inputs.json, which says it only when it is another


@dataclass(frozen=True)
class ImageInput:
    """What a matcher sees of an image.

    kind `pixels`: RGB, `size` pixels a side. crop `center`: short side resized, centre cut out; `squash`: resized without regard to
    the aspect; `random`: a random resized crop in training, `center` elsewhere. flip: half of the training images are mirrored.
    exif: an image is turned as its EXIF orientation says; False leaves it as it is stored (weights that were trained so).
    exact: training pixels are those of evaluation (PIL), where a crop is not random.
    scaled: a training JPEG of at least twice the size is decoded at 1/2, 1/4 or 1/8 of its own, where a crop is not random.
    kind `regions`: the first `max_regions` rows of the region file, zero-padded; features not `region_width` wide (where set) are refused.
    """

    kind: Literal["pixels", "regions"] = "pixels"
    size: int = 224
    crop: Literal["center", "random", "squash"] = "center"
    flip: bool = False
    max_regions: int = 36
    region_width: int | None = None
    exif: bool = True
    exact: bool = False
    scaled: bool = False

    @classmethod
    def of(cls, data: Data) -> ImageInput:
        training = {"exact": data.exact_pixels, "scaled": data.scaled_jpeg}
        return cls(data.image, data.image_size, data.crop, data.flip, data.max_regions, exif=data.exif, **training)

    @classmethod
    def trained_on(cls, data: Data, first: bytes | None) -> ImageInput:
        """What training reads: region files where the recipe says so, or where it keeps features. first: one of them.

        Raises ValueError as `read_regions`.
        """
        image = cls.of(data)
        if not reads_regions(data) or first is None:
            return image
        held = Regions.from_npz(first)
        rows = len(held.features) if data.cache_features else image.max_regions
        return replace(image, kind="regions", max_regions=rows, region_width=held.features.shape[1])

    def said(self) -> dict[str, Any]:
        """The choices as files and identities have them: those that earlier versions had not, only where unusual."""
        usual = ("exif", True), ("exact", False), ("scaled", False)
        return {name: value for name, value in asdict(self).items() if (name, value) not in usual}

    def shapes(self, images: int) -> dict[str, tuple[int, ...]]:
        """Of the uint8 columns of so many images, where they are known beforehand: those of pixels are."""
        return {"pixels": (images, self.size, self.size, 3)} if self.kind == "pixels" else {}


def reads_regions(data: Data) -> bool:
    """Whether training reads region files."""
    return data.image == "regions" or data.cache_features


@dataclass(frozen=True)
class Draw:
    """The random numbers of one training image, each uniform in [0, 1)."""

    area: float
    aspect: float
    left: float
    top: float
    mirror: float


def draw(seed: int, epoch: int, key: str) -> Draw:
    """Counter-based: the same numbers for the same (seed, epoch, key), whoever asks and whenever."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=20).digest()
    return Draw(*(number / 2**32 for number in struct.unpack("<5I", digest)))


def fit(image: Image.Image, size: int, crop: str) -> np.ndarray:
    """(size,size,3) uint8: bicubic; `squash`, or short side to `size` and centre crop."""
    width, height, left, top = _frame(*image.size, size, crop)
    return np.asarray(resized(image, (width, height), (left, top, left + size, top + size)))


def _frame(width: int, height: int, size: int, crop: str) -> tuple[int, int, int, int]:
    """Width and height to resize to, then left and top of the square to cut out."""
    if crop == "squash":
        return size, size, 0, 0
    short = min(width, height)
    width, height = (size if side == short else int(size * side / short) for side in (width, height))
    return width, height, round((width - size) / 2), round((height - size) / 2)


def framed(width: int, height: int, size: int, crop: str) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what `fit` leaves of an image, in units of the image."""
    wide, high, left, top = _frame(width, height, size, crop)
    return left / wide, top / high, (left + size) / wide, (top + size) / high


def fit_quickly(data: bytes, size: int, crop: str, out: np.ndarray | None = None, exif: bool = True, halving: bool = False) -> np.ndarray:
    """`fit` of a JPEG by torch's antialiased bicubic, a fifth of the time, no value off by more than 1; other formats by `fit` itself.

    A JPEG that has the size already is decoded right into `out`, where one is given. One that is so long that all of it must not be
    resized is left to `fit`, too.
    halving: a JPEG of at least twice the size is decoded at 1/2, 1/4 or 1/8: less time, values off by 1.2 to 3 levels on average.
    """
    decoded = decode_jpeg(data, size if halving else None, out, exif, halving=True)
    if decoded is None:
        return fit(decode(data, exif), size, crop)
    stored_width, stored_height = jpeg_size(data, exif) if halving else (decoded.shape[1], decoded.shape[0])
    width, height, left, top = _frame(stored_width, stored_height, size, crop)
    if decoded.shape[:2] == (height, width):
        return decoded[top : top + size, left : left + size]
    if width * height > max(decoded.shape[0] * decoded.shape[1], MOST * size * size):
        return fit(Image.fromarray(decoded), size, crop)
    whole = torch.from_numpy(decoded)[None].permute(0, 3, 1, 2)  # channels last, and so stays
    scaled = interpolate(whole, (height, width), mode="bicubic", antialias=True)
    return scaled[0, :, top : top + size, left : left + size].permute(1, 2, 0).numpy()


def random_box(width: int, height: int, numbers: Draw) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a random resized crop: area 0.5..1 of the image, aspect 3/4..4/3 (log-uniform), cut to what fits."""
    area = width * height * (0.5 + 0.5 * numbers.area)
    aspect = (4 / 3) ** (2 * numbers.aspect - 1)
    across = min(width, max(1, round((area * aspect) ** 0.5)))
    down = min(height, max(1, round((area / aspect) ** 0.5)))
    left, top = numbers.left * (width - across), numbers.top * (height - down)
    return left, top, left + across, top + down


def augment(data: bytes, image: ImageInput, numbers: Draw, out: np.ndarray | None = None) -> np.ndarray:
    """(size,size,3) uint8 of a training image; of a random crop by scaled JPEG decode and bilinear resize, not equal to `fit`.

    `out`, where given, is filled and returned. Raises ValueError as `decode`.
    """
    if image.crop != "random":
        if image.exact:
            pixels = fit(decode(data, image.exif), image.size, image.crop)
        else:
            pixels = fit_quickly(data, image.size, image.crop, out, image.exif, image.scaled)
    else:
        picture = _decode_near(data, image.size, image.exif)
        box = random_box(picture.width, picture.height, numbers)
        pixels = np.asarray(picture.resize((image.size, image.size), Image.Resampling.BILINEAR, box=box))
    if image.flip and numbers.mirror < 0.5:
        pixels = torch.from_numpy(pixels.copy()).flip(1).numpy()  # numpy is slower
    if out is None:
        return pixels
    if not np.may_share_memory(pixels, out):
        out[...] = pixels
    return out


def _decode_near(data: bytes, size: int, exif: bool) -> Image.Image:
    """A JPEG decoded at the smallest DCT scale that keeps `size` after a half-area crop; other formats in full."""
    decoded = decode_jpeg(data, int(size * 1.5), exif=exif)
    return decode(data, exif) if decoded is None else Image.fromarray(decoded)


def read_regions(data: bytes, limit: int, width: int | None = None) -> dict[str, np.ndarray]:
    """Region file -> regions (limit,Dv) float32, boxes (limit,7) float32, mask (limit,) bool, zero-padded.

    Box numbers x1 y1 x2 y2 w h w*h, divided by the image's width and height (UNITER); zero in a file without boxes.
    Raises ValueError naming what is wrong.
    """
    held = Regions.from_npz(data)
    if width is not None and held.features.shape[1] != width:
        raise ValueError(f"its region features are {held.features.shape[1]} wide, those of this matcher {width}")
    rows = min(limit, len(held.features))
    regions = np.zeros((limit, held.features.shape[1]), np.float32)
    boxes = np.zeros((limit, 7), np.float32)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        regions[:rows] = held.features[:rows]
    if held.boxes is not None:
        if held.width <= 0 or held.height <= 0:
            raise ValueError(f"a region file with boxes needs the width and height of its image, not {held.width} x {held.height}")
        boxes[:rows] = box_numbers(held.boxes[:rows].astype(np.float32), held.width, held.height)
    if not (np.isfinite(regions).all() and np.isfinite(boxes).all()):
        raise ValueError("the region file holds values that are not finite")
    return {"regions": regions, "boxes": boxes, "mask": np.arange(limit) < rows}


def box_numbers(corners: np.ndarray, width: float, height: float) -> np.ndarray:
    """(R,4) pixel corners -> (R,7) x1 y1 x2 y2 w h w*h in units of the image."""
    corners = corners / np.array([width, height, width, height], np.float32)
    sides = corners[:, 2:] - corners[:, :2]
    return np.concatenate([corners, sides, sides.prod(1, keepdims=True)], 1)


class Inputs:
    """The preparation that belongs to a matcher: how its images and its captions are made. Saved beside its weights.

    `images` and `captions` come on the device `target`, which a matcher sets to its own.
    """

    def __init__(self, image: ImageInput, tokenizer: Any) -> None:
        self.image = image
        self.tokenizer = tokenizer
        self.target = torch.device("cpu")

    def image_columns(self, data: bytes, numbers: Draw | None = None, out: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """One image as named arrays: `pixels` (S,S,3) uint8, or `regions`, `boxes`, `mask`; augmented when `numbers` are given.

        Training pixels are written to `out["pixels"]`, where there is one. Raises ValueError when the bytes cannot be read.
        """
        if self.image.kind == "regions":
            return read_regions(data, self.image.max_regions, self.image.region_width)
        try:
            if numbers is None:
                return {"pixels": fit(decode(data, self.image.exif), self.image.size, self.image.crop)}
            return {"pixels": augment(data, self.image, numbers, (out or {}).get("pixels"))}
        except MemoryError:
            raise ValueError("cannot decode image: there is not enough memory for it") from None

    def images(self, raw: Sequence[bytes], image_id: Sequence[int] | None = None) -> Images:
        """Encoded images or region files -> Images; `image_id` defaults to 0..N-1. Raises ValueError with the position of a bad one."""
        rows = []
        for position, data in enumerate(raw):
            try:
                rows.append(self.image_columns(data))
            except ValueError as error:
                raise ValueError(f"image {position}: {error}") from None
        columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return as_images(columns, np.arange(len(raw)) if image_id is None else np.asarray(image_id)).to(self.target)

    def captions(self, texts: Sequence[str], image_id: Sequence[int] | None = None) -> Captions:
        """Strings -> Captions; `image_id` defaults to 0..N-1."""
        tokens, mask = self.tokenizer(list(texts))
        ids = torch.arange(len(texts)) if image_id is None else torch.as_tensor(np.asarray(image_id), dtype=torch.int64)
        return Captions(tokens, mask, ids).to(self.target)

    def save(self, folder: str | Path) -> None:
        """`inputs.json` and the tokenizer's files."""
        folder = Path(folder)
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        (folder / "inputs.json").write_text(json.dumps({"image": self.image.said()}, indent=1))
        self.tokenizer.save(folder / "tokenizer")

    @classmethod
    def load(cls, folder: str | Path) -> Inputs:
        """Raises ValueError when the folder was not written by `save`, NewerFormat."""
        path = Path(folder) / "inputs.json"
        if not path.exists():
            raise ValueError(f"no {path}: the folder does not hold a matcher's inputs")
        said = json.loads(path.read_text())
        check_format(str(path), said, FORMAT)
        return cls(ImageInput(**said["image"]), load_tokenizer(Path(folder) / "tokenizer"))


def as_images(columns: dict[str, np.ndarray], image_id: np.ndarray) -> Images:
    """Stacked image columns -> Images. Pixels (B,S,S,3) become (B,3,S,S) as a channels-last view, without a copy."""
    ids = torch.as_tensor(image_id, dtype=torch.int64)
    if "pixels" in columns:
        return Images(ids, pixels=torch.from_numpy(columns["pixels"]).permute(0, 3, 1, 2))
    return Images(ids, None, *(torch.from_numpy(columns[name]) for name in ("regions", "boxes", "mask")))
