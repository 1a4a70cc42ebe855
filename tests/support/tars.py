"""Tars member by member, whole or wrong, and records to pack."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np

from itm.data.records import Caption, Record, Regions


def png(seed: int = 0, side: int = 16) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def records(n: int = 3) -> list[Record]:
    regions = Regions(np.arange(12, dtype=np.float16).reshape(2, 6), np.ones((2, 4), np.float32), 64, 48, np.ones(2, np.float32))
    return [
        Record(f"k{i}", "train", [Caption(f"{i}-{n}", f"caption {n} é") for n in range(i + 1)], png(i), "png", regions, {"image_id": i})
        for i in range(n)
    ]


def tar_of(path, contents: list[tuple[str, bytes]], **how) -> str:
    with tarfile.open(path, "w", **how) as archive:
        for name, data in contents:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def pair(key: str, *texts: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", b"pixels of " + key.encode()), (f"{key}.json", json.dumps({"captions": list(texts)}).encode())]
