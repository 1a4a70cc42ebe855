"""Scenes to search, photos of several shapes among them, two small matchers that read them, and the service over both in this process."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from itm.config import Part
from itm.data.manifest import Manifest, write_manifest
from itm.data.preprocess import ImageInput, Inputs
from itm.data.records import Record
from itm.data.shards import read_manifest, write_shard
from itm.data.sources.scenes import Scenes
from itm.data.text import WordVocabulary
from itm.matchers.folder import build_matcher, save_matcher
from itm.types import Matcher
from pipelines.serving.api import build
from pipelines.serving.backend import Here
from pipelines.serving.guard import Access, App
from pipelines.serving.limits import Limits
from pipelines.serving.served import Place, ServedModel

CONV = {"kind": "conv", "image_size": 64, "hidden": 24}
DUAL = Part(kind="dual", options={"image": CONV, "text": {"kind": "pooled_gru"}, "width": 32})
SCAN = Part(kind="scan", options={"image": CONV, "text": {"kind": "gru", "word_dim": 32, "width": 128}})
SHAPES = ((3, 2), (2, 3), (1, 1), (16, 9))


def scenes(count: int, seed: int = 0, split: str = "test") -> list[Record]:
    made = Scenes(world="equiv", seed=seed, n_train=count, n_val=count, n_test=count)
    return [record for record in made.records(split) if isinstance(record, Record)]


def write_scenes(folder: Path, rows: list[Record], shards: int = 2, framed: bool = False) -> str:
    """A split. framed: each scene lies on a larger ground of one of SHAPES, as photos have many shapes."""
    if framed:
        rows = [
            Record(r.key, r.split, r.captions, on_ground(r.image or b"", *SHAPES[n % 4]), "jpg", None, r.meta) for n, r in enumerate(rows)
        ]
    size = -(-len(rows) // shards)
    infos = [write_shard(str(folder / f"{n:05d}.tar"), rows[n * size : (n + 1) * size]) for n in range(shards)]
    write_manifest(str(folder), Manifest(split=folder.name, source="scenes", shards=infos))
    return str(folder)


def add_scenes(folder: str, rows: list[Record]) -> None:
    """One more shard at the end of a split, of images that it does not have yet."""
    manifest = read_manifest(folder)
    new = [replace(row, key=f"new-{row.key}", meta={**row.meta, "image_id": f"new-{row.key}"}) for row in rows]
    more = write_shard(f"{folder}/{len(manifest.shards):05d}.tar", new)
    write_manifest(folder, manifest.model_copy(update={"shards": [*manifest.shards, more]}))


def on_ground(data: bytes, across: int, down: int, side: int = 480) -> bytes:
    """A JPEG of a picture in the middle of a larger one of that shape."""
    whole = Image.new("RGB", (side * across // max(across, down), side * down // max(across, down)), (226, 222, 210))
    small = min(whole.size)
    with Image.open(io.BytesIO(data)) as picture:
        whole.paste(picture.convert("RGB").resize((small, small)), ((whole.width - small) // 2, (whole.height - small) // 2))
    out = io.BytesIO()
    whole.save(out, "JPEG", quality=88)
    return out.getvalue()


def matcher_for(rows: list[Record], part: Part, steps: int = 0, seed: int = 0) -> Matcher:
    """A matcher with the vocabulary of the rows, trained for some steps on them: contrastive, both directions."""
    torch.manual_seed(seed)
    words = WordVocabulary.from_captions([caption.text for row in rows for caption in row.captions], min_count=1)
    matcher = build_matcher(part, Inputs(ImageInput(size=64, crop="squash"), words))
    if steps:
        train(matcher, rows, steps)
    return matcher.eval()


def train(matcher: Matcher, rows: list[Record], steps: int, batch: int = 32) -> None:
    optimizer = torch.optim.Adam(matcher.parameters(), 2e-3)
    images = matcher.inputs.images([row.image or b"" for row in rows])
    captions = matcher.inputs.captions([row.captions[0].text for row in rows])
    matcher.train()
    for _ in range(steps):
        chosen = torch.randperm(len(rows))[:batch]
        scores = matcher.score(matcher.encode_images(images[chosen]), matcher.encode_captions(captions[chosen])) / 0.1
        target = torch.arange(len(chosen))
        loss = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def saved(matcher: Matcher, folder: Path) -> str:
    save_matcher(matcher, folder)
    return str(folder)


def service(*places: Place, limits: Limits | None = None, access: Access | None = None) -> tuple[App, dict[str, Any]]:
    """The whole service in this process, and its models by name."""
    models = [ServedModel(place) for place in places]
    return build(Here(models), limits or Limits(rate=0), access), {model.place.name: model for model in models}
