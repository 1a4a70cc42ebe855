"""Image files by their bytes: what a file is called says nothing certain about what it holds."""

from __future__ import annotations

import io

SUFFIXES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "heic", "heif", "avif"}
STORED = ("jpg", "png", "webp")
"""Formats that a shard holds as they come; the others that are read become a PNG of the same pixels (the first frame of several)."""
_CONVERTED = {"gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}
_BRANDS = {b"avif": "avif", b"avis": "avif", b"heic": "heic", b"heix": "heic", b"mif1": "heic", b"msf1": "heic", b"hevc": "heic"}
HEAD = 18  # bytes that tell the format


def image_format(head: bytes) -> str | None:
    """jpg, png, webp, gif, bmp, tiff, heic or avif by the first `HEAD` bytes; None for what is no image."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head[:4] + head[8:12] == b"RIFFWEBP":
        return "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"BM") and head[14:18] in [n.to_bytes(4, "little") for n in (12, 40, 52, 56, 64, 108, 124)]:
        return "bmp"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "tiff"
    return _BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None


def as_stored(data: bytes) -> tuple[bytes, str, str | None]:
    """(bytes for a shard, their extension, the format they were converted from or None).

    Raises ValueError for what is no image, or of a format that is not read.
    """
    found = image_format(data[:HEAD])
    if found in STORED:
        return data, str(found), None
    if found in _CONVERTED:
        return _png(data, _CONVERTED[found]), "png", found
    if found:
        raise ValueError(f"is a {found.upper()} image, which is not read: convert it to JPEG or PNG")
    raise ValueError("is empty" if not data else "is no image: its bytes are of no known format")


def _png(data: bytes, kind: str) -> bytes:
    from PIL import Image

    from itm.data.records import MAX_PIXELS

    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels, the limit is {MAX_PIXELS}")
            image.load()
            kept = image.mode in ("1", "L", "LA", "I;16", "RGB", "RGBA")
            mode = image.mode if kept else "RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB"
            out = io.BytesIO()
            image.convert(mode).save(out, "PNG")
    except Exception as error:  # PIL plugins raise almost anything on corrupt input
        raise ValueError(f"cannot be decoded: {error}") from None
    return out.getvalue()
