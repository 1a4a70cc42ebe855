"""Pictures of noise, each of other bytes, and files of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from itm.data.records import Record
from itm.data.sources.source import Source


def picture(seed: int = 0, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def write(folder: Path, content: dict[str, bytes | str]) -> Path:
    """Files by their names below a folder."""
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def said(source: Source, split: str = "train") -> dict[str, list[str]]:
    """File name (else key) -> captions that can be used."""
    records = [r for r in source.records(split) if isinstance(r, Record)]
    return {r.meta.get("filename", r.key): [c.text for c in r.captions if not c.fault()] for r in records}
