"""Image files by their bytes: what a file is called says nothing certain about what it holds."""

from __future__ import annotations

from itm.data import records
from itm.data.records import IMAGE_FORMATS, storable

SUFFIXES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "heic", "heif", "avif"}
_BRANDS = {b"avif": "avif", b"avis": "avif", b"heic": "heic", b"heix": "heic", b"mif1": "heic", b"msf1": "heic", b"hevc": "heic"}
HEAD = 18  # bytes that tell the format


def image_format(head: bytes) -> str | None:
    """jpg, png, webp, gif, bmp, tiff, heic or avif by the first `HEAD` bytes; None for what is no image."""
    return records.image_format(head) or (_BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None)


def as_stored(data: bytes) -> tuple[bytes, str, str | None]:
    """(bytes for a shard, their extension, the format they were converted from or None).

    Raises ValueError for what is no image, or of a format that is not read.
    """
    found = image_format(data[:HEAD])
    if found in _BRANDS.values():
        raise ValueError(f"is a {str(found).upper()} image, which is not read: convert it to JPEG or PNG")
    if found is None:
        raise ValueError("is empty" if not data else "is no image: its bytes are of no known format")
    image, extension = storable(data)
    return image, extension, None if found in IMAGE_FORMATS else found
