"""The features stage inside the test process, on photos of one coloured square each."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from itm.config import Recipe
from itm.data.records import Caption, Record
from itm.data.shards import Sample, read_manifest, read_samples
from pipelines import features as stage
from pipelines.featuring.actors import Choices, Extract, Prepare
from pipelines.on_ray.shard_actors import ShardJob
from tests.support.small_teaching import pack

WIDE, HIGH = 96, 64


def photo(colour: tuple[int, int, int]) -> bytes:
    """Black, but for a square of one colour in the upper left quarter."""
    pixels = np.zeros((HIGH, WIDE, 3), np.uint8)
    pixels[: HIGH // 2, : WIDE // 2] = colour
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def photos(root: Path, count: int = 6, per_shard: int = 2) -> None:
    records = [
        Record(
            f"k{n}",
            "train",
            [Caption(f"c{n}{i}", f"photo {n} {i}") for i in range(1 + n % 3)],
            photo(((40 * n + 40) % 256, 10 + n // 6, 200)),
            "png",
        )
        for n in range(count)
    ]
    pack(root, records, per_shard)


def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The two operators of the stage without Ray between them; the list tells the region shards that were made."""
    worked: list[str] = []

    def extract(recipe: Recipe, choices: Choices, todo: list[ShardJob]) -> Iterator[str]:
        actor = Extract(choices, recipe.features.batch_size, "cpu")
        for job in todo:
            rows: list[dict[str, Any]] = actor(Prepare(choices.image)(pa.table({"job": [json.dumps(asdict(job))]}))).to_pylist()
            if rows[0]["error"]:
                raise ValueError(rows[0]["error"])
            worked.append(rows[0]["uri"])
            yield rows[0]["uri"]

    monkeypatch.setattr(stage, "_extract", extract)
    return worked


def samples(folder: Path) -> list[Sample]:
    found = [item for shard in read_manifest(str(folder)).shards for item in read_samples(str(folder / shard.name))]
    assert all(isinstance(item, Sample) for item in found)
    return [item for item in found if isinstance(item, Sample)]
