"""Search a sharded set with a matcher: text -> images, or image -> captions.

    itm search "a red circle left of a blue square" --model models:/itm-matcher@champion --shards data/shards/test -k 5
    itm search --image photo.jpg --model runs/demo/demo/matcher --shards data/shards/test
    itm search "two dogs" --model models:/itm-matcher@champion --shards data/shards/test --html hits.html

--model is a matcher folder or a URI of the registry, --shards the folder of a split. The first search encodes the split and keeps the
result below --index (default <shards>/index), one Arrow file for each pair of weights and manifest; later ones read it. Matchers that
score pairs (late interaction, joint encoders) have no vector to keep: their encoded parts are kept and every pair is scored exactly.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import itm
from itm.data import files
from itm.data.formats import check_format
from itm.data.shards import Sample, read_manifest, read_samples
from itm.evaluation.dataset import EncodedSplit, Names, encode_split, encode_texts
from itm.evaluation.scoring import encode_rows, score_matrix, scoring_mode
from itm.types import Encoded
from pipelines.evaluate import weights_hash

FORMAT = 1
FIELDS = ("vector", "parts", "mask")  # what `score` reads; `uni` serves other questions


@dataclass(frozen=True)
class Hit:
    """One answer: an image with its captions, or a caption with its image. `key` and `shard` say where the image lies."""

    rank: int
    score: float
    key: str
    shard: str
    captions: list[str]


@dataclass(frozen=True)
class Hits:
    """The best answers to `question`, best first; prints as a table."""

    question: str
    searched: str
    hits: list[Hit]

    def __str__(self) -> str:
        lines = [
            f"{hit.rank:>3}  {hit.score:7.4f}  {hit.key:<16}  {files.name_of(hit.shard):<12}  {' | '.join(hit.captions)}"
            for hit in self.hits
        ]
        return "\n".join([f"{self.question!r} in {self.searched}", *lines])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", help="what to look for")
    parser.add_argument("--image", help="look for the captions of this image file instead")
    parser.add_argument("--model", required=True, help="models:/name@alias, models:/name/version or a matcher folder")
    parser.add_argument("--shards", required=True, help="folder or URI of a split")
    parser.add_argument("-k", type=int, default=5, help="how many answers (default 5)")
    parser.add_argument("--index", help="where encoded splits are kept (default <shards>/index)")
    parser.add_argument("--html", help="also write a page with the images")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    if (args.text is None) == (args.image is None):
        raise ValueError('give either a text or --image, e.g. itm search "a red circle" --model ... --shards ...')
    found = search(args.text, image=args.image, model=args.model, shards=args.shards, k=args.k, index=args.index)
    print(json.dumps(asdict(found), indent=1) if args.json else found)
    if args.html:
        files.write_atomic(args.html, page(found).encode())


def search(text: str | None = None, *, model: str, shards: str, image: str | None = None, k: int = 5, index: str | None = None) -> Hits:
    """The k best images for `text`, or the k best captions for the file `image`.

    Raises ValueError for an unknown model or split, an unreadable image, or k < 1.
    """
    if k < 1:
        raise ValueError(f"-k is {k}; ask for at least one answer")
    matcher = itm.load_matcher(model)
    split = load_index(matcher, shards, index or files.join(shards, "index"))
    if text is not None:
        scores = score_matrix(matcher, split.images, encode_texts(matcher, [text]))[:, 0]
    else:
        assert image is not None
        with scoring_mode(matcher):
            asked = encode_rows(matcher, matcher.inputs.images([files.read_bytes(image)]))
        scores = score_matrix(matcher, asked, split.captions)[0]
    best = scores.topk(min(k, len(scores)))
    names = split.names
    hits = [
        _hit(names, rank, value, row, by_caption=text is None)
        for rank, (value, row) in enumerate(zip(*map(torch.Tensor.tolist, best), strict=True), 1)
    ]
    return Hits(text if text is not None else str(image), f"{len(names.image_keys)} images, {len(names.texts)} captions of {shards}", hits)


def _hit(names: Names, rank: int, score: float, row: int, by_caption: bool) -> Hit:
    image = int(names.caption_image[row]) if by_caption else row
    rows = [row] if by_caption else (names.caption_image == image).nonzero()[:, 0].tolist()
    return Hit(rank, score, names.image_keys[image], names.image_shards[image], [names.texts[r] for r in rows])


def load_index(matcher: Any, shards: str, index: str) -> EncodedSplit:
    """The encoded split, from the cache or made now. A change of weights, preparation or shards is another file."""
    uri = files.join(index, f"{_identity(matcher)}-{read_manifest(shards).fingerprint()}.arrow")
    if files.exists(uri):
        return _read_index(uri, shards)
    files.check_writable(index)
    split = encode_split(matcher, shards)
    for problem in split.problems:
        print(f"not searchable: {problem.key} in {problem.shard} ({problem.stage}: {problem.reason})")
    _write_index(uri, split)
    return split


def _identity(matcher: Any) -> str:
    """12 hex digits of what decides the encoding: weights, architecture and preparation."""
    tokenizer = matcher.inputs.tokenizer
    choices = (weights_hash(matcher), matcher.inputs.image, tokenizer.vocab_size, tokenizer.max_length, tokenizer.clean)
    return hashlib.sha256(repr(choices).encode()).hexdigest()[:12]


def _write_index(uri: str, split: EncodedSplit) -> None:
    """Two Arrow streams in one file, images and then captions."""
    names = split.names
    images = {"key": pa.array(names.image_keys), "shard": pa.array([files.name_of(s) for s in names.image_shards])}
    captions = {"id": pa.array(names.caption_ids), "text": pa.array(names.texts), "image": pa.array(names.caption_image.numpy())}
    with files.atomic_stream(uri) as stream:
        for columns, encoded in ((images, split.images), (captions, split.captions)):
            table = pa.table(columns | {field: _column(value) for field in FIELDS if (value := getattr(encoded, field)) is not None})
            table = table.replace_schema_metadata({"itm": json.dumps({"format": FORMAT})})
            with pa.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table)


def _column(tensor: torch.Tensor) -> pa.Array:
    flat = tensor.flatten(1).contiguous()
    values = pa.array(flat.flatten().numpy().astype(np.uint8 if tensor.dtype == torch.bool else np.float32))
    kind = pa.fixed_shape_tensor(values.type, tensor.shape[1:])
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(values, flat.shape[1]))


def _read_index(uri: str, shards: str) -> EncodedSplit:
    stream = pa.BufferReader(files.read_bytes(uri))
    images, captions = pa.ipc.open_stream(stream).read_all(), pa.ipc.open_stream(stream).read_all()
    check_format(uri, json.loads((images.schema.metadata or {}).get(b"itm", b"{}")), FORMAT)
    names = Names(
        image_keys=images["key"].to_pylist(),
        caption_ids=captions["id"].to_pylist(),
        caption_image=torch.tensor(captions["image"].to_numpy()),
        texts=captions["text"].to_pylist(),
        image_shards=[files.join(shards, name) for name in images["shard"].to_pylist()],
    )
    return EncodedSplit(_encoded(images), _encoded(captions), names)


def _encoded(table: pa.Table) -> Encoded:
    tensors = {}
    for field in FIELDS:
        if field in table.column_names:
            array = table[field].combine_chunks()
            array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
            tensor = torch.tensor(array.to_numpy_ndarray())
            tensors[field] = tensor.bool() if field == "mask" else tensor
    return Encoded(**tensors)


def page(found: Hits) -> str:
    """A self-contained HTML page: question, then each answer with its image, score and captions."""
    pictures, title = _pictures(found), html.escape(found.question)
    figures = []
    for hit in found.hits:
        words = "<br>".join(map(html.escape, (hit.key, *hit.captions)))
        image = f'<img src="{pictures.get((hit.shard, hit.key), "")}" alt="{html.escape(hit.key)}">'
        figures.append(f"<figure>{image}<figcaption><b>{hit.rank}. {hit.score:.4f}</b> {words}</figcaption></figure>")
    style = "body{font:15px sans-serif;margin:2em}figure{display:inline-block;width:240px;margin:8px;vertical-align:top}img{max-width:100%}"
    head = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return f"{head}<h1>{title}</h1><p>{html.escape(found.searched)}</p>{''.join(figures)}"


def _pictures(found: Hits) -> dict[tuple[str, str], str]:
    """(shard, key) -> data URI, for the images that the shards hold."""
    wanted = {(hit.shard, hit.key) for hit in found.hits}
    pictures = {}
    for shard in {shard for shard, _ in wanted}:
        for sample in read_samples(shard):
            if isinstance(sample, Sample) and sample.image and (shard, sample.key) in wanted:
                kind = {b"\x89P": "png", b"RI": "webp"}.get(sample.image[:2], "jpeg")
                pictures[shard, sample.key] = f"data:image/{kind};base64,{base64.b64encode(sample.image).decode()}"
    return pictures


if __name__ == "__main__":
    import sys

    from pipelines.cli import stage_main

    sys.exit(stage_main("search"))
