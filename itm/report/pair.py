"""One pair in numbers: what a matcher that has it can show of an image and a caption beside their score.

    found = find_pair("data/shards/test", "000017")
    told = explained(matcher, found, device)

Each picture is a function here that gives its numbers or refuses with the reason; a new one costs a file and a line in PICTURES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from itm.data import files
from itm.data.formats import Json
from itm.data.manifest import full_key
from itm.data.records import Caption
from itm.data.shards import Sample, index_shard, read_manifest, read_range, read_samples
from itm.evaluation.attention import places, spelled
from itm.evaluation.scoring import scoring_mode
from itm.precision import computing
from itm.report.gates import edges_of, gates_of
from itm.report.relations import relations_of
from itm.report.thresholds import cut_of
from itm.types import Captions, Encoded, Images, Matcher

FORMAT = 1  # of what `itm explain --json` prints


@dataclass(frozen=True)
class Pair:
    """An image and a caption of a split. own: the caption is one of the image's."""

    image: Sample
    shard: str
    caption: Caption
    own: bool


@dataclass(frozen=True)
class Prepared:
    """A pair as one matcher sees it; `words`: what stands behind every token, '' for start and end."""

    raw: tuple[Images, Captions]
    encoded: tuple[Encoded, Encoded]
    words: list[str]


def find_pair(split_uri: str, image_key: str, caption_id: str | None = None) -> Pair:
    """An image by its key, and a caption by its id (its own first one, unset). A key that several shards use has its shard in front.

    Raises ValueError for what the split does not hold, naming what it holds.
    """
    shards = [files.join(split_uri, shard.name) for shard in read_manifest(split_uri).shards]
    found = next(((uri, e) for uri in shards for e in index_shard(uri) if image_key in (e.key, full_key(uri, e.key))), None)
    if found is None:
        first = next((e.key for uri in shards for e in index_shard(uri)), None)
        raise ValueError(f"{split_uri} holds no image {image_key!r}; keys look like {first!r}: `itm evaluate` writes them")
    uri, entry = found
    sample = read_range(uri, entry.start, entry.end)
    own = next((c for c in sample.captions if caption_id in (None, c.id, full_key(uri, c.id))), None)
    if own is not None:
        return Pair(sample, uri, own, True)
    if caption_id is None:
        raise ValueError(f"image {image_key!r} of {split_uri} has no caption: name one of another image, --pair {image_key} CAPTION_KEY")
    for shard in shards:
        for other in read_samples(shard):
            for caption in other.captions if isinstance(other, Sample) else ():
                if caption_id in (caption.id, full_key(shard, caption.id)):
                    return Pair(sample, uri, caption, False)
    ids = ", ".join(caption.id for caption in sample.captions)
    raise ValueError(f"{split_uri} holds no caption {caption_id!r}; those of image {image_key!r} are {ids or 'none'}")


def attention_of(matcher: Matcher, pair: Pair, seen: Prepared) -> Json:
    """`words`, `weights` (a row of image parts for each), `boxes` of the parts (None: nobody knows their places), `grid`: patches."""
    image, caption = seen.encoded
    if image.parts is None or caption.parts is None:
        raise ValueError(f"{matcher.kind} compares one vector a side: nothing attends")
    found = matcher.attention(image, caption)
    if found is None:
        raise ValueError(f"{matcher.kind} does not say where its words look")
    real = [slice(None) if rows.mask is None else rows.mask[0].cpu() for rows in (caption, image)]
    weights = found[0].float().cpu()[real[0]][:, real[1]]
    shown = [place for place, word in enumerate(seen.words[: len(weights)]) if word]
    rows = [[round(value, 6) for value in weights[place].tolist()] for place in shown]
    form = matcher.inputs.image
    boxes = places(form, pair.image, weights.shape[1])
    return {"words": [seen.words[place] for place in shown], "weights": rows, "boxes": boxes, "grid": form.kind != "regions"}


PICTURES: dict[str, tuple[str, Callable[[Matcher, Pair, Prepared], Json]]] = {
    "attention": ("where the words look", attention_of),
    "relations": ("relation matrices", lambda matcher, _, seen: relations_of(matcher, *seen.raw, seen.words)),
    "gates": ("gates of the words", lambda matcher, _, seen: gates_of(matcher, *seen.encoded, seen.words)),
    "edges": ("edges of the reasoning steps", lambda matcher, _, seen: edges_of(matcher, *seen.encoded, seen.words)),
    "cut": ("words that the threshold cuts", lambda matcher, _, seen: cut_of(matcher, *seen.encoded, seen.words)),
}
"""Key in the numbers -> title, and what gives the numbers or raises ValueError with the reason why there are none."""


def explained(matcher: Matcher, pair: Pair, device: torch.device) -> Json:
    """`kind`, `score`, the numbers of each picture of PICTURES that there is, and `lacks`: the others, each with its reason.

    Raises ValueError for an image that the matcher cannot read.
    """
    regions = matcher.inputs.image.kind == "regions"
    data = pair.image.regions if regions else pair.image.image
    if data is None:
        raise ValueError(
            f"image {pair.image.key!r} of {pair.shard} has no {'region file' if regions else 'image'}, which this matcher reads"
        )
    told: Json = {"kind": matcher.kind}
    with scoring_mode(matcher, device), computing("fp32", device):
        raw = matcher.inputs.images([data]).to(device), matcher.inputs.captions([pair.caption.text]).to(device)
        encoded = matcher.encode_images(raw[0]), matcher.encode_captions(raw[1])
        seen = Prepared(raw, encoded, spelled(matcher.inputs.tokenizer, pair.caption.text))
        told["score"] = float(matcher.score(*encoded)[0, 0])
        lacks = []
        for name, (title, numbers) in PICTURES.items():
            try:
                told[name] = numbers(matcher, pair, seen)
            except (ValueError, NotImplementedError) as error:
                lacks.append(f"{title}: {error}")
    return told | {"lacks": lacks}
