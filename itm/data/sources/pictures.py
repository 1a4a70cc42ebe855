"""Image files by their bytes: what a file is called says nothing certain about what it holds."""

from __future__ import annotations

from itm.data.records import image_format

SUFFIXES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "heic", "heif", "avif"}
HEAD = 18  # bytes that tell the format
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"hevc": "HEIC"}
_BITMAPS = [n.to_bytes(4, "little") for n in (12, 40, 52, 56, 64, 108, 124)]  # lengths of their header: `BM` begins many a text


def is_image(head: bytes) -> bool:
    """Whether a file that begins so is an image, of a kind that is read or not."""
    found = image_format(head)
    return head[14:18] in _BITMAPS if found == "bmp" else found is not None or _unread(head) is not None


def image_fault(data: bytes) -> str | None:
    """Why the bytes are no image that is read, to be said after its name; None where they are one by their beginning."""
    if found := _unread(data):
        return f"is a {found} image, which is not read: convert it to JPEG or PNG"
    if image_format(data) is None:
        return "is no image: its bytes are of no known format" if data else "is empty"
    return None


def _unread(head: bytes) -> str | None:
    return _BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None
