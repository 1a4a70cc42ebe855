"""The best answers of a sharded set to a question, by a matcher: across modalities by its scores, within one by its uni-modal vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

import torch

import itm
from itm.data import files
from itm.device import resolve_device
from itm.evaluation.dataset import EncodedSplit, Names, encode_texts
from itm.evaluation.scoring import encode_rows, score_matrix, scoring_mode
from itm.evaluation.uni_modal import likeness
from itm.precision import computing
from itm.retrieval.index import load_index
from itm.types import Encoded, Matcher

Find = Literal["images", "captions"]


class Place(TypedDict, total=False):
    """index: where encoded splits are kept (default <shards>/index); device: auto (default), cpu, cuda, ... (`resolve_device`)."""

    index: str | None
    device: str


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
    find: Find | None = None,
    **place: Unpack[Place],
) -> Hits:
    """The k best images for `text`, or the k best captions for the file `image`; `find` asks for the other kind of answer.

    Across modalities the score is the matcher's, within one the cosine of `uni_vectors`: its uni-modal heads where it has some.
    model: a URI as in `itm.load_matcher`, or a matcher that was loaded. place: `Place`.
    Raises ValueError for an unknown model or split, an unreadable image, k < 1, a device that is not there, captions asked of a split
    without any, or a matcher without vectors asked within a modality.
    """
    if k < 1:
        raise ValueError(f"-k is {k}; ask for at least one answer")
    find = find or ("captions" if text is None else "images")
    if find not in ("images", "captions"):
        raise ValueError(f"find={find!r} is unknown; ask for images or captions")
    where, index = resolve_device(place.get("device", "auto")), place.get("index")
    matcher = itm.load_matcher(model) if isinstance(model, str) else model
    asked, within = _asked(matcher, text, image, where), (find == "captions") == (text is not None)
    split = load_index(matcher, shards, index or files.join(shards, "index"), where, uni=within)
    if find == "captions" and not split.names.caption_ids:
        raise ValueError(f"the images of {shards} have no captions, so none can be found for {text or image}: ask for images")
    scores = _within(asked, split, find) if within else _across(matcher, asked, split, find, where)
    best = scores.topk(min(k, len(scores)))
    names = split.names
    hits = [
        _hit(names, rank, value, row, by_caption=find == "captions")
        for rank, (value, row) in enumerate(zip(*map(torch.Tensor.tolist, best), strict=True), 1)
    ]
    return Hits(text if text is not None else str(image), f"{len(names.image_keys)} images, {len(names.texts)} captions of {shards}", hits)


def _asked(matcher: Matcher, text: str | None, image: str | None, device: torch.device) -> Encoded:
    if text is not None:
        return encode_texts(matcher, [text], device=device)
    assert image is not None
    with scoring_mode(matcher, device), computing("fp32", device):
        return encode_rows(matcher, matcher.inputs.images([files.read_bytes(image)]), device=device)


def _across(matcher: Matcher, asked: Encoded, split: EncodedSplit, find: Find, device: torch.device) -> torch.Tensor:
    if find == "images":
        return score_matrix(matcher, split.images, asked, device=device)[:, 0]
    return score_matrix(matcher, asked, split.captions, device=device)[0]


def _within(asked: Encoded, split: EncodedSplit, find: Find) -> torch.Tensor:
    gallery, what = (split.images, "image") if find == "images" else (split.captions, "caption")
    return likeness(asked, gallery, what)[0]


def _hit(names: Names, rank: int, score: float, row: int, by_caption: bool) -> Hit:
    image = int(names.caption_image[row]) if by_caption else row
    rows = [row] if by_caption else (names.caption_image == image).nonzero()[:, 0].tolist()
    return Hit(rank, score, names.image_keys[image], names.image_shards[image], [names.texts[r] for r in rows])
