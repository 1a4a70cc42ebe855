"""The best answers of a sharded set to a question, by a matcher."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import itm
from itm.data import files
from itm.device import resolve_device
from itm.evaluation.dataset import Names, encode_texts
from itm.evaluation.scoring import encode_rows, score_matrix, scoring_mode
from itm.precision import computing
from itm.retrieval.index import load_index
from itm.types import Matcher


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


def search(
    text: str | None = None,
    *,
    model: str | Matcher,
    shards: str,
    image: str | None = None,
    k: int = 5,
    index: str | None = None,
    device: str = "auto",
) -> Hits:
    """The k best images for `text`, or the k best captions for the file `image`.

    model: a URI as in `itm.load_matcher`, or a matcher that was loaded.
    Raises ValueError for an unknown model or split, an unreadable image, k < 1, a device that is not there, or an
    image asked of a split without captions.
    """
    if k < 1:
        raise ValueError(f"-k is {k}; ask for at least one answer")
    where = resolve_device(device)
    matcher = itm.load_matcher(model) if isinstance(model, str) else model
    split = load_index(matcher, shards, index or files.join(shards, "index"), where)
    if text is not None:
        scores = score_matrix(matcher, split.images, encode_texts(matcher, [text], device=where), device=where)[:, 0]
    else:
        assert image is not None
        if not split.names.caption_ids:
            raise ValueError(f"the images of {shards} have no captions, so none can be found for {image}: ask for images with a text")
        with scoring_mode(matcher, where), computing("fp32", where):
            asked = encode_rows(matcher, matcher.inputs.images([files.read_bytes(image)]), device=where)
        scores = score_matrix(matcher, asked, split.captions, device=where)[0]
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
