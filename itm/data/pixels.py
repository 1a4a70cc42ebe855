"""Encoded images to RGB pixels, and pixels to another size: one way for training, evaluation, teachers and the report.

The orientation that a camera noted (EXIF) is applied, what is transparent lies over white, and grey of 16 bits is scaled to 8. What is
held in memory on the way is bounded by the image and by the result, whatever the aspect ratio.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from itm.data.records import MAX_PIXELS, open_image

MOST = 16
"""Times the pixels of the result that resizing may hold, where the image itself has fewer."""
_ORIENTATION = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ROWS = 1 << 20  # pixels of 16 bits that are scaled at a time


def decode(data: bytes, exif: bool = True) -> Image.Image:
    """RGB image, turned as its EXIF orientation says unless `exif` is False; of several frames the first.

    Raises ValueError when the bytes are no whole image or promise more than MAX_PIXELS.
    """
    try:
        image = open_image(data)
        image.load()
        turn = _TURN.get(_orientation(image)) if exif else None
        image = _rgb(image)
        return image if turn is None else image.transpose(turn)
    except Exception as error:  # hostile bytes make decoders raise almost anything
        raise ValueError(f"cannot decode image: {error or type(error).__name__}") from None


@dataclass(frozen=True)
class Traits:
    """Of an image as it is stored: width and height, whether its EXIF orientation turns it, whether it may be transparent."""

    width: int
    height: int
    turned: bool
    transparent: bool


def traits(data: bytes) -> Traits:
    """Decodes the image whole. Raises ValueError as `decode`."""
    try:
        with open_image(data) as image:
            image.load()
            return Traits(*image.size, _orientation(image) in _TURN, image.has_transparency_data)
    except Exception as error:
        raise ValueError(f"cannot decode image: {error or type(error).__name__}") from None


def _orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF counts, 1 where it is not said or not readable."""
    try:
        said = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block is no reason to refuse the picture
        return 1
    return said if said in _TURN else 1


def _rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode. Grey of 16 bits (PIL's I;16, or I) is scaled to 8, where PIL's own conversion would cut it off at 255."""
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        grey = np.empty(wide.shape, np.uint8)
        step = max(1, _ROWS // image.width)
        for top in range(0, image.height, step):
            grey[top : top + step] = np.rint(wide[top : top + step].astype(np.float64).clip(0, 65535) / 257)
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")


def resized(
    image: Image.Image,
    size: tuple[int, int],
    cut: tuple[int, int, int, int] | None = None,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """The part `cut` (left, top, right, bottom; unset: all) of the image as it is when resized to `size` (width, height).

    Where the whole would have more pixels than the image and than `MOST` results, only `cut` is computed, from its part of the image; its
    values are those of the whole up to rounding.
    """
    (width, height), (left, top, right, bottom) = size, cut or (0, 0, *size)
    most = max(image.width * image.height, MOST * (right - left) * (bottom - top))
    if width * max(height, image.height) <= most:
        whole = image.resize(size, resample)
        return whole if cut is None else whole.crop(cut)
    across, down = image.width / width, image.height / height
    first, last = left * across, min(right * across, image.width)
    upper, lower = top * down, min(bottom * down, image.height)
    if (right - left) * (lower - upper) > most:  # PIL goes across first, and would widen every row
        image = image.resize((image.width, bottom - top), resample, (0, upper, image.width, lower))
        upper, lower = 0, bottom - top
    return image.resize((right - left, bottom - top), resample, (first, upper, last, lower))


def decode_jpeg(
    data: bytes, least: int | None = None, into: np.ndarray | None = None, exif: bool = True, halving: bool = False
) -> np.ndarray | None:
    """(H,W,3) uint8, bit for bit as `decode` gives it; at the smallest DCT scale of at least `least` pixels a side where that is given.

    halving: of the scales 1, 1/2, 1/4 and 1/8 alone, for which decoders have quick kernels.
    The memory is that of `into` when the image has its size. None for what `decode` has to judge: another format, colours of print,
    a size beyond the limit, a damaged file.
    """
    if not simplejpeg.is_jpeg(data):
        return None
    try:
        header = simplejpeg.decode_jpeg_header(data)
        height, width = map(int, header[:2])
        if height * width > MAX_PIXELS or header[2] not in ("YCbCr", "Gray", "RGB"):
            return None
        orientation = _jpeg_orientation(data) if exif else 1
        short = min(height, width)
        halved = max(n for n in (1, 2, 4, 8) if n == 1 or short >= n * (least or short))
        if least is None or (halving and halved == 1):
            fits = into is not None and into.shape == (height, width, 3) and orientation == 1
            return _turned(np.asarray(simplejpeg.decode_jpeg(data, "RGB", buffer=into if fits else None)), orientation)
        least = -(-short // halved) if halving else min(least, short)
        scaled = simplejpeg.decode_jpeg(data, "RGB", fastdct=not halving, min_height=least, min_width=least, min_factor=1)
        return _turned(np.asarray(scaled), orientation)
    except ValueError:
        return None


def jpeg_size(data: bytes, exif: bool = True) -> tuple[int, int]:
    """Width and height in which `decode_jpeg` gives a JPEG in full."""
    height, width = map(int, simplejpeg.decode_jpeg_header(data)[:2])
    return (height, width) if exif and _jpeg_orientation(data) >= 5 else (width, height)


def _jpeg_orientation(data: bytes) -> int:
    """As PIL has it, which is asked only where there is an EXIF or XMP segment: opening costs as much as decoding a small image."""
    if b"Exif\0" not in data and b"http://ns.adobe.com/xap/" not in data:  # a tenth of the time of a walk
        return 1
    for marker, start, end in _segments(data):
        if marker == 0xE1 and data[start:end].startswith((b"Exif\0", b"http://ns.adobe.com/xap/")):
            try:
                return _orientation(open_image(data))
            except Exception:  # the decoder has the last word
                return 1
    return 1


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte, end) of the segments of a JPEG before its first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a filler
            at += 1
            continue
        if marker == 0xDA:
            return
        (length,) = struct.unpack(">H", data[at + 2 : at + 4])
        yield marker, at + 4, at + 2 + length
        at += 2 + max(2, length)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H,W,3) as PIL's transpose of the same name turns it."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[rows, columns])
