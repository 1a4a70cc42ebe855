"""The rows of a request to a served model: every form in which people and JSON hand over images and texts, made one."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KEYS = ("image", "text")


@dataclass(frozen=True)
class Row:
    """One row, at least one side of which is there. image: encoded bytes."""

    number: int
    image: bytes | None
    text: str | None


def rows_of(given: Any, paths: bool = False) -> list[Row]:
    """As many rows as came.

    given: a text, an image (encoded bytes, PIL, uint8 (H, W), (H, W, 3) or (H, W, 4)), a list or one-dimensional array of those, an array
    of images (N, H, W, 3), a list of {"image": ..., "text": ...}, or a dict of such columns. A string is a text, but for `data:` URIs and
    what stands under "image": there it is base64 or, with `paths`, a file of this machine.
    Raises ValueError naming the rows that are empty, and the row that is none of these.
    """
    cells = _cells(given)
    rows = [_row(number, cell, paths) for number, cell in enumerate(cells)]
    if not rows:
        raise ValueError("the request holds no row")
    if empty := [row.number for row in rows if row.image is None and row.text is None]:
        named = ", ".join(map(str, empty[:20])) + ", ..." * (len(empty) > 20)
        raise ValueError(f"row{'s' * (len(empty) > 1)} {named} of {len(rows)}: empty; each needs an image or a text (rows count from 0)")
    return rows


def _cells(given: Any) -> list[Any]:
    if isinstance(given, np.ndarray):
        return _of_array(given)
    if isinstance(given, Mapping):
        return _of_columns(given)
    return list(given) if isinstance(given, list | tuple) else [given]


def _of_array(given: np.ndarray) -> list[Any]:
    if given.dtype.kind in "USO" and given.ndim < 2:
        return [given.item()] if given.ndim == 0 else given.tolist()
    if given.dtype.kind in "iub" and (given.ndim == 2 or (given.ndim == 3 and given.shape[-1] in (1, 3, 4))):
        return [given]
    if given.dtype.kind in "iub" and given.ndim == 4 and given.shape[-1] in (1, 3, 4):
        return list(given)
    raise ValueError(f"an array {given.shape} of {given.dtype} is no input: images are uint8 (H, W), (H, W, 3) or (N, H, W, 3)")


def _of_columns(given: Mapping[Any, Any]) -> list[Any]:
    columns = {str(name): _cells(value) for name, value in given.items() if name in KEYS}
    if not columns:
        raise ValueError(f"the input needs a column 'image' or 'text', it has {list(map(str, given))}")
    if len(lengths := {name: len(cells) for name, cells in columns.items()}) > 1 and len(set(lengths.values())) > 1:
        raise ValueError(f"the columns differ in length: {lengths}")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _row(number: int, cell: Any, paths: bool) -> Row:
    if isinstance(cell, Mapping):
        if cell and not set(cell) & set(KEYS):
            raise ValueError(f"row {number} has neither 'image' nor 'text', it has {list(map(str, cell))}")
        image, text = (_scalar(cell.get(name)) for name in KEYS)
    else:
        is_text = isinstance(cell, str) and not cell.startswith("data:")
        image, text = (None, cell) if is_text else (cell, None)
    text = None if _is_null(text) else text
    if text is not None and not isinstance(text, str):
        raise ValueError(f"row {number}: its text is a {type(text).__name__}, not a string")
    return Row(number, None if _is_null(image) else _image_bytes(image, number, paths), text)


def _scalar(value: Any) -> Any:
    """MLflow's server makes an array () of a string that stands in a row."""
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _is_null(value: Any) -> bool:
    """None, NaN, pandas' NA and NaT, and what holds nothing."""
    if isinstance(value, str):
        return not value.strip()
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return value != value if isinstance(value, float | np.floating) else isinstance(value, bytes | Sequence) and not len(value)


def _image_bytes(value: Any, row: int, paths: bool) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Image.Image):
        return _png(value)
    if isinstance(value, list | np.ndarray):
        return _png(Image.fromarray(_pixels(np.asarray(value), row)))
    if isinstance(value, str | Path):
        return _named_image(value, row, paths)
    raise ValueError(f"row {row}: a {type(value).__name__} is no image: give bytes, base64, a PIL image or an array")


def _pixels(array: np.ndarray, row: int) -> np.ndarray:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if not fits or not array.size or array.dtype.kind not in "iub" or array.min() < 0 or array.max() > 255:
        raise ValueError(f"row {row}: an array {array.shape} of {array.dtype} is no image: (H, W), (H, W, 3) or (H, W, 4) from 0 to 255")
    return np.ascontiguousarray(array, dtype=np.uint8)


def _png(image: Image.Image) -> bytes:
    """Encoded without loss."""
    stream = io.BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")).save(stream, "PNG")
    return stream.getvalue()


def _named_image(value: str | Path, row: int, paths: bool) -> bytes:
    text = str(value)
    if paths and len(text) < 4096 and Path(text).is_file():
        return Path(text).read_bytes()
    encoded = re.sub(r"\s+", "", text.partition(",")[2] if text.startswith("data:") else text).translate(str.maketrans("-_", "+/"))
    try:
        if isinstance(value, Path):
            raise binascii.Error
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except binascii.Error:
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        way = "" if paths else ", and files of the server are not opened here (switch on: model_config paths, or ITM_PATHS=1)"
        raise ValueError(f"row {row}: {shown!r} is neither base64 nor a file{way}") from None
