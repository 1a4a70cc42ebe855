"""Teaching a packed handful of scenes inside the test process."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from itm.config import parse_recipe
from itm.data.manifest import Manifest
from itm.data.records import Record
from itm.data.shards import Sample, read_manifest, read_samples, write_manifest, write_shard
from itm.data.sources.scenes import Scenes
from pipelines.teaching.actors import Prepare, Score, Written

SHUFFLED = {"kind": "shuffled", "options": {"of": {"kind": "scenes_image", "options": {"world": "tiny"}}, "seed": 7}}


SHUFFLED_TEXT = {"kind": "shuffled", "options": {"of": {"kind": "scenes_text", "options": {"world": "tiny"}}, "seed": 7}}


def pack(root: Path, records: list[Record], per_shard: int = 4) -> Manifest:
    shards = [
        write_shard(str(root / "train" / f"{n:05d}.tar"), records[start : start + per_shard])
        for n, start in enumerate(range(0, len(records), per_shard))
    ]
    manifest = Manifest(split="train", source="test", shards=shards)
    write_manifest(str(root / "train"), manifest)
    return manifest


def scenes(n: int) -> list[Record]:
    """Scenes whose images have one to five captions, so that nothing can assume five."""
    source = Scenes("tiny", seed=1)
    records = [source.item("train", k) for k in range(n)]
    return [Record(r.key, r.split, r.captions[: 1 + k % 5], r.image, r.image_format, None, r.meta) for k, r in enumerate(records)]


def recipe(root: Path, image: dict | None = None, text: dict | None = None, **more: object):
    data = {"root": str(root), **more}
    return parse_recipe({"name": "t", "model": {"kind": "dual"}, "data": data, "teachers": {"image": image, "text": text}})


def samples(root: Path) -> list[Sample]:
    return [s for shard in read_manifest(str(root / "train")).shards for s in read_samples(str(root / "train" / shard.name))]


def score_here(job, uri, todo, identity, *, prepare, skip=None):
    """The two operators without Ray between them."""
    for shard in todo:
        row = {"shard": [f"{job.split_uri}/{shard.name}"], "header": [json.dumps(vars(job.header(shard, identity)))]}
        row |= {} if skip is None else {"skip": [skip[shard.name]]}
        actor = Score(job.part, job.modality, uri, 3)
        (written,) = actor(Prepare(job.modality, prepare)(pa.table(row))).to_pylist()
        if error := written.pop("error"):
            raise ValueError(error)
        yield Written(**written)
