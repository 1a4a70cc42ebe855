"""Where the words of a text look in an image of an index."""

from __future__ import annotations

import torch

from itm.data.pixels import decode
from itm.data.records import Regions
from itm.data.shards import Sample
from itm.evaluation.attention import looks, places, spelled
from itm.evaluation.scoring import scoring_mode
from itm.precision import computing
from itm.retrieval.questions import Explanation
from itm.types import Encoded, Matcher


def explained(matcher: Matcher, sample: Sample, text: str, device: torch.device) -> Explanation:
    """Raises ValueError for a matcher without attention, an image that it cannot read, and one whose parts lie nowhere known."""
    form = matcher.inputs.image
    data = sample.regions if form.kind == "regions" else sample.image
    if data is None:
        what = "region file" if form.kind == "regions" else "image"
        raise ValueError(f"image {sample.key!r} has no {what}, which this matcher reads")
    with scoring_mode(matcher, device), computing("fp32", device):
        image = matcher.encode_images(matcher.inputs.images([data]).to(device))
        caption = matcher.encode_captions(matcher.inputs.captions([text]).to(device))
        found = (looks(*one) for one in _members(matcher, image, caption))
        weights = next((own for own in found if own is not None), None)
    if weights is None:
        raise ValueError(f"{matcher.kind} compares one vector a side: dual encoders have no attention to show")
    boxes = places(form, sample, weights.shape[1])
    if boxes is None:
        raise ValueError(f"nobody knows where the parts of image {sample.key!r} lie: regions without boxes, or patches that make no square")
    words = [(place, word) for place, word in enumerate(spelled(matcher.inputs.tokenizer, text)[: len(weights)]) if word]
    width, height = _size(sample, form.exif)
    return Explanation(
        text=text,
        words=[word for _, word in words],
        weights=[weights[place].tolist() for place, _ in words],
        boxes=[[x1 * width, y1 * height, x2 * width, y2 * height] for x1, y1, x2, y2 in boxes],
        width=width,
        height=height,
        grid=form.kind != "regions",
    )


def _members(matcher: Matcher, image: Encoded, caption: Encoded) -> list[tuple[Matcher, Encoded, Encoded]]:
    if not image.each:
        return [(matcher, image, caption)]
    return list(zip(matcher.averaged, image.each, caption.each, strict=True))


def _size(sample: Sample, exif: bool) -> tuple[int, int]:
    """Width and height in pixels: of the photo, or as its region file says."""
    if sample.image is not None:
        return decode(sample.image, exif).size
    held = Regions.from_npz(sample.regions or b"")
    return int(held.width), int(held.height)
