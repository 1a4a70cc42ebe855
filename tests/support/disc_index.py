"""Six discs of five colours in two shards, with two captions each and a field `size`, and what searches them."""

from __future__ import annotations

from pathlib import Path

from itm.config import Part
from itm.data.manifest import Manifest, write_manifest
from itm.data.records import Caption, Record
from itm.data.shards import write_shard
from tests.support.registry_world import picture

COLOURS = ["red", "blue", "green", "yellow", "black", "blue"]
SCAN = Part(kind="scan", options={"image": {"kind": "conv", "image_size": 32, "hidden": 16}, "text": {"kind": "gru", "width": 128}})


def texts_of(colour: str) -> list[str]:
    return [f"a {colour} circle", f"a circle left {colour}"]


def disc(number: int, colour: str, split: str = "test") -> Record:
    """Sizes differ, so that no two files are the same bytes."""
    captions = [Caption(f"k{number}-{n}", text) for n, text in enumerate(texts_of(colour))]
    return Record(f"k{number}", split, captions, picture(colour, 32 + number), "png", None, {"size": 32 + number, "colour": colour})


def write_discs(split: Path, colours: list[str] = COLOURS, per_shard: int = 3, first: int = 0) -> str:
    records = [disc(first + n, colour, split.name) for n, colour in enumerate(colours)]
    shards = [records[n : n + per_shard] for n in range(0, len(records), per_shard)]
    infos = [write_shard(str(split / f"{n:05d}.tar"), rows) for n, rows in enumerate(shards)]
    write_manifest(str(split), Manifest(split=split.name, source="discs", shards=infos))
    return str(split)
