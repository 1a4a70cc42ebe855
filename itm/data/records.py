"""What a source yields: `Record`, one image with its captions; and `Problem`, a row of the quarantine table."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from itm.data.formats import Json
from itm.data.npz import plain_arrays

if TYPE_CHECKING:
    import PIL.Image

IMAGE_FORMATS = ("jpg", "jpeg", "png", "webp")
# A crafted file of a few KB can claim gigapixels; 64 M pixels is above any camera still in use.
MAX_PIXELS = 64_000_000
# PIL would also try formats that start other programs (EPS) or that no photograph comes in.
_PIL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
}
_BMP_HEADERS = [n.to_bytes(4, "little") for n in (12, 40, 52, 56, 64, 108, 124)]
_AS_PNG = {"I;16B": "I;16", "I;16L": "I;16", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}
MAX_CAPTION = 20_000
"""Characters: ten pages of text describe no single image, and tokenizers are not all linear."""
MAX_REGION_BYTES = 64 << 20
"""Unpacked: 100 regions of 2048 float32 are 0.8 MB; a compressed npz of a few KB can claim gigabytes."""
_REGION_ARRAYS = ("features", "boxes", "conf", "width", "height")


@dataclass(frozen=True)
class Problem:
    """One thing that was left out, and why. `what` says how much was lost: a caption, a file of a sample, a sample, (part of) a shard.

    captions: those that were lost with a sample and have no row of their own.
    """

    key: str
    shard: str
    stage: str
    reason: str
    what: Literal["caption", "member", "sample", "shard"] = "sample"
    captions: int = 0

    @property
    def lost_captions(self) -> int:
        return 1 if self.what == "caption" else self.captions

    def row(self) -> str:
        """One line of quarantine.jsonl. What is no Unicode is written as its JSON escape."""
        said = {name: value for name, value in asdict(self).items() if (name, value) != ("captions", 0)}
        return json.dumps(said, ensure_ascii=False).encode(errors="backslashreplace").decode()


class RowsLost(ValueError):
    """Rows went in that neither came out nor were rejected."""


def check_rows(where: str, seen: int, kept: int, rejected: int) -> None:
    """Raises RowsLost naming `where` (the shard or store) and the counts unless every row that went in came out or was rejected."""
    if seen != kept + rejected:
        raise RowsLost(
            f"{where}: {seen} rows went in, {kept} came out and {rejected} were rejected, which leaves "
            f"{seen - kept - rejected} unaccounted for; delete its output and run the stage again"
        )


@dataclass(frozen=True)
class Caption:
    """id is unique in its split; meta holds what the source knows about this caption (scenes: its logical form).

    unread: why the source could not read it (file, row and field), which leaves `text` empty.
    """

    id: str
    text: str
    meta: Json = field(default_factory=dict)
    unread: str | None = None

    def fault(self) -> str | None:
        """Why this caption cannot be used, or None."""
        if self.unread:
            return self.unread
        if not self.text or self.text.isspace():
            return f"caption {self.id} is empty"
        if len(self.text) > MAX_CAPTION:
            return f"caption {self.id} has {len(self.text):,} characters, the limit is {MAX_CAPTION:,}"
        if self.text.isascii() and self.id.isascii():
            return None
        try:
            (self.id + self.text).encode()
        except UnicodeEncodeError as error:
            return f"caption {self.id!r} is not Unicode text: {error.reason}"
        return None


@dataclass(frozen=True, eq=False)
class Regions:
    """Precomputed regions of one image: features (R,Dv), boxes (R,4) float32 x1 y1 x2 y2 in pixels, conf (R,) float32.

    Features are written as float16, unless they are float32 and `whole` says that they shall stay so.
    """

    features: np.ndarray
    boxes: np.ndarray | None = None
    width: int = 0
    height: int = 0
    conf: np.ndarray | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or not len(self.features):
            raise ValueError(f"region features must be (R, Dv) with R > 0, not {self.features.shape}")
        for name, array, shape in (("boxes", self.boxes, (len(self.features), 4)), ("conf", self.conf, (len(self.features),))):
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} must be {shape}, not {array.shape}")

    def to_npz(self) -> bytes:
        """Uncompressed npz, the same bytes for the same values (numpy stamps its members 1980-01-01)."""
        dtype = np.float32 if self.whole else np.float16
        arrays = {"features": self.features.astype(dtype), "width": np.int32(self.width), "height": np.int32(self.height)}
        for name in ("boxes", "conf"):
            if (array := getattr(self, name)) is not None:
                arrays[name] = array.astype(np.float32)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_npz(cls, data: bytes) -> Regions:
        """Arrays may be views of `data`. Raises ValueError when the bytes are no region file. Nothing in them is unpickled."""
        arrays = plain_arrays(data, MAX_REGION_BYTES)
        if arrays is None:
            try:
                with zipfile.ZipFile(io.BytesIO(data)) as held:
                    if (size := sum(info.file_size for info in held.infolist())) > MAX_REGION_BYTES:
                        raise ValueError(f"it unpacks to {size:,} bytes, the limit is {MAX_REGION_BYTES:,}")
                    inside = set(held.namelist())
                    arrays = {name: _array(held, f"{name}.npy") for name in _REGION_ARRAYS if f"{name}.npy" in inside}
            except Exception as error:  # crafted archives make zipfile and numpy raise almost anything
                raise ValueError(f"not a region file: {error}") from None
        else:
            arrays = {name: arrays[name] for name in _REGION_ARRAYS if name in arrays}
        if "features" not in arrays:
            raise ValueError("a region file needs the array 'features'")
        for name, array in arrays.items():
            if array.dtype.kind not in "fiu":
                raise ValueError(f"region array {name!r} must hold numbers, not {array.dtype}")
        width, height = (_whole_number(name, arrays.get(name)) for name in ("width", "height"))
        return cls(arrays["features"], arrays.get("boxes"), width, height, arrays.get("conf"))


@dataclass(frozen=True, eq=False)
class Record:
    """One image with its captions. `key` has no dot and no slash; `meta` is JSON-able and may hold `image_id` (default: the key)."""

    key: str
    split: str
    captions: list[Caption]
    image: bytes | None = None
    image_format: str = "jpg"
    regions: Regions | None = None
    meta: Json = field(default_factory=dict)


def _array(held: zipfile.ZipFile, name: str) -> np.ndarray:
    with held.open(name) as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        return array


def _whole_number(name: str, array: np.ndarray | None) -> int:
    if array is None:
        return 0
    if array.size != 1 or not np.isfinite(array).all():
        raise ValueError(f"region array {name!r} must be one number, not of shape {array.shape}")
    return int(array.item())


def json_fault(*values: object) -> str | None:
    """Why these names and metadata cannot be stored in a shard, or None."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return f"its names or metadata cannot be written as JSON: {error}"
    return None


def open_image(data: bytes) -> PIL.Image.Image:
    """A PIL image whose pixels are not decoded yet. Raises ValueError when it promises more than MAX_PIXELS; PIL raises what it likes."""
    from PIL import Image, UnidentifiedImageError, WebPImagePlugin

    if not WebPImagePlugin.SUPPORTED:
        raise RuntimeError("this Pillow was built without WebP, which shards may hold: install a Pillow wheel of 11 or newer")
    try:
        image = Image.open(io.BytesIO(data), formats=_PIL_FORMATS)
    except UnidentifiedImageError:  # its own text names a memory address, another one each time
        raise ValueError("of no known image format") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, the limit is {MAX_PIXELS}")
    return image


def image_format(data: bytes) -> str | None:
    """jpg, png, webp, gif, bmp or tiff, by the first bytes; None for what is none of them."""
    for start, name in _MAGIC.items():
        if data.startswith(start) and (name != "bmp" or data[14:18] in _BMP_HEADERS):
            return name
    return "webp" if data[:4] + data[8:12] == b"RIFFWEBP" else None


def storable(data: bytes) -> tuple[bytes, str]:
    """An image as a shard holds it, and its extension: JPEG, PNG and WebP byte for byte, GIF, BMP and TIFF as PNG of their first frame.

    Raises ValueError when the bytes cannot be decoded, or hold values that PNG does not (floating point).
    """
    from PIL import Image

    found = image_format(data)
    if found in IMAGE_FORMATS:
        return data, found
    try:
        with open_image(data) as image:
            image.load()
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, whose range nobody knows; save it with 8 or 16 bits")
            kept = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert(_AS_PNG.get(image.mode, "RGB"))
            if image.mode == "I":  # 32 bits that hold 16, as everywhere here
                kept = Image.fromarray(np.asarray(image).clip(0, 65535).astype(np.uint16))
            out = io.BytesIO()
            kept.save(out, "PNG")
    except Exception as error:  # PIL plugins raise almost anything on corrupt input
        raise ValueError(f"image cannot be decoded: {error}") from None
    return out.getvalue(), "png"


def check_image(data: bytes) -> tuple[int, int]:
    """Decode an image whole; returns (width, height). Raises ValueError when it is corrupt, truncated or implausibly large."""
    try:
        with open_image(data) as image:
            image.load()
            width, height = image.size
    except Exception as error:  # PIL plugins raise almost anything on corrupt input
        raise ValueError(f"image cannot be decoded: {error}") from None
    return width, height
