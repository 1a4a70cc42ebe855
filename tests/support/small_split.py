"""A packed split of scenes and an untrained matcher for it: what evaluation needs, in a second."""

from __future__ import annotations

from pathlib import Path

from itm.config import Part, Recipe, parse_recipe
from itm.data.preprocess import ImageInput, Inputs
from itm.data.records import Record
from itm.data.shards import Manifest, write_manifest, write_shard
from itm.data.sources.scenes import Scenes
from itm.data.text import WordVocabulary
from itm.matchers.folder import build_matcher, save_matcher

MODEL = Part(kind="dual", options={"image": {"kind": "conv", "image_size": 64}, "text": {"kind": "pooled_gru"}, "width": 16})


def records(count: int) -> list[Record]:
    return [record for record in Scenes(world="tiny", n_test=count).records("test") if isinstance(record, Record)]


def write_split(folder: Path, rows: list[Record], shards: int = 2, source: str = "scenes made-up") -> Manifest:
    """`rows` in `shards` tars below `folder`, with a manifest."""
    size = -(-len(rows) // shards)
    infos = [write_shard(str(folder / f"{n:05d}.tar"), rows[n * size : (n + 1) * size]) for n in range(shards)]
    manifest = Manifest(split=folder.name, source=source, shards=infos)
    write_manifest(str(folder), manifest)
    return manifest


def small_run(folder: Path, count: int = 12, **sections) -> Recipe:
    """A recipe whose test split is packed and whose run folder holds a matcher with fresh weights."""
    rows = records(count)
    write_split(folder / "shards" / "test", rows)
    recipe = parse_recipe(
        {"name": "small", "output": str(folder / "runs"), "data": {"root": str(folder / "shards")}, "model": MODEL.model_dump(), **sections}
    )
    texts = [caption.text for row in rows for caption in row.captions]
    inputs = Inputs(ImageInput(size=64, crop="squash"), WordVocabulary.from_captions(texts, min_count=1))
    save_matcher(build_matcher(MODEL, inputs), f"{recipe.folder}/matcher")
    return recipe
