"""Splits of noise images with known captions, packed in a moment, and all samples that a plan yields of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from itm.config import Text
from itm.data import files
from itm.data.manifest import Manifest, write_manifest
from itm.data.pairs import Pairs
from itm.data.plan import Plan
from itm.data.preprocess import ImageInput, Inputs
from itm.data.records import Caption, Record, Regions
from itm.data.shards import Sample, read_samples, write_shard
from itm.data.text import build_tokenizer

COLOURS = ("red", "green", "blue", "white", "black")


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def small_split(
    root: Path, name: str = "train", shards: int = 3, samples: int = 8, broken: tuple[int, ...] = (), **options: bool
) -> Manifest:
    """Shards of noise images with 1 to 3 captions each; image `broken` cannot be decoded."""
    infos = []
    for shard in range(shards):
        records = []
        for n in range(shard * samples, (shard + 1) * samples):
            texts = [f"a {COLOURS[(n + k) % 5]} thing number {COLOURS[n % 5]}" for k in range(1 + n % 3)]
            captions = [Caption(f"c{n}.{k}", text) for k, text in enumerate(texts)]
            if options.get("wordless") and n == 0:
                captions[0] = Caption(captions[0].id, "...")
            regions = Regions(np.full((2 + n % 2, 3), n, np.float16), np.ones((2 + n % 2, 4), np.float32), 24, 20)
            image = b"broken" if n in broken else png(n)
            records.append(Record(f"k{n:03d}", name, captions, image, "png", regions if options.get("regions") else None))
        infos.append(write_shard(files.join(root, name, f"{shard:05d}.tar"), records))
    manifest = Manifest(split=name, source="test", shards=infos)
    write_manifest(files.join(root, name), manifest)
    return manifest


def world(root: Path, image: ImageInput | None = None, batch: int = 6, **given: object) -> Pairs:
    manifest = small_split(root, **given)  # type: ignore[arg-type]
    plan = Plan.of(manifest, seed=0, batch=batch, window=2)
    texts = [
        c.text
        for s in manifest.shards
        for i in read_samples(files.join(root, "train", s.name))
        if isinstance(i, Sample)
        for c in i.captions
    ]
    inputs = Inputs(image or ImageInput(size=16, crop="center"), build_tokenizer(Text(max_length=10, clean=False), texts))
    return Pairs(files.join(root, "train"), manifest, plan, inputs, {})


def every_sample(pairs: Pairs) -> list[list[Sample]]:
    return [[i for i in read_samples(files.join(pairs.fetch.split, s.name)) if isinstance(i, Sample)] for s in pairs.fetch.manifest.shards]
