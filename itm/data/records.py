"""What a source yields: `Record`, one image with its captions; and `Problem`, a row of the quarantine table."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

IMAGE_FORMATS = ("jpg", "jpeg", "png", "webp")
# A crafted file of a few KB can claim gigapixels; 64 M pixels is above any camera still in use.
MAX_PIXELS = 64_000_000


@dataclass(frozen=True)
class Problem:
    """One thing that was left out, and why. `what` says how much was lost: a caption, a sample, or (part of) a shard."""

    key: str
    shard: str
    stage: str
    reason: str
    what: Literal["caption", "sample", "shard"] = "sample"

    def row(self) -> str:
        """One line of quarantine.jsonl."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class Caption:
    """id is unique in its split; meta holds what the source knows about this caption (scenes: its logical form)."""

    id: str
    text: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Regions:
    """Precomputed regions of one image: features (R,Dv) float16, boxes (R,4) float32 x1 y1 x2 y2 in pixels, conf (R,) float32."""

    features: np.ndarray
    boxes: np.ndarray | None = None
    width: int = 0
    height: int = 0
    conf: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or not len(self.features):
            raise ValueError(f"region features must be (R, Dv) with R > 0, not {self.features.shape}")
        for name, array, shape in (("boxes", self.boxes, (len(self.features), 4)), ("conf", self.conf, (len(self.features),))):
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} must be {shape}, not {array.shape}")

    def to_npz(self) -> bytes:
        """Uncompressed npz, the same bytes for the same values (numpy stamps its members 1980-01-01)."""
        arrays = {"features": self.features.astype(np.float16), "width": np.int32(self.width), "height": np.int32(self.height)}
        for name in ("boxes", "conf"):
            if (array := getattr(self, name)) is not None:
                arrays[name] = array.astype(np.float32)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_npz(cls, data: bytes) -> Regions:
        """Raises ValueError when the bytes are no region file."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as npz:
                arrays = dict(npz.items())
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"not a region file: {error}") from None
        if "features" not in arrays:
            raise ValueError(f"a region file needs the array 'features'; this one has {', '.join(arrays) or 'none'}")
        width, height = (int(arrays.get(name, 0)) for name in ("width", "height"))
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
    meta: dict[str, Any] = field(default_factory=dict)


def check_image(data: bytes) -> tuple[int, int]:
    """Decode an image whole; returns (width, height). Raises ValueError when it is corrupt, truncated or implausibly large."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS:,}")
            image.load()
    except ValueError:
        raise
    except Exception as error:  # PIL plugins raise almost anything on corrupt input
        raise ValueError(f"image cannot be decoded: {error}") from None
    return width, height
