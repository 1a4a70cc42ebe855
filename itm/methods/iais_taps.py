"""Where the relation blocks of IAIS come from: the joint attention of a single-stream matcher, or cosines of the parts of any other.

The second is an extension (docs/methods/iais.md#other-architectures): the parts of one side have not seen the other, so it is
another hypothesis than the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itm.matchers.dual import DualEncoder
from itm.matchers.joint.pairs import Relations, inner_words, parts_of
from itm.matchers.late.base import LateInteraction
from itm.types import Captions, Encoded, Images

COSINE_SMOOTHING = 9.0  # SCAN's lambda_softmax for attention between words and regions

Tap = Callable[[Images, Captions], tuple[Encoded, Encoded, Relations]]


def find_tap(matcher: nn.Module) -> Tap:
    """Row-aligned (Images, Captions) -> both encodings and the relation blocks of the pairs.

    Raises ValueError with the reason when the matcher has no words and regions to relate.
    """
    if hasattr(matcher, "pairs"):
        return lambda images, captions: _joint(matcher, images, captions)
    if isinstance(matcher, LateInteraction):
        smoothing = float(getattr(matcher, "lambda_softmax", COSINE_SMOOTHING))
        return lambda images, captions: _late(matcher, images, captions, smoothing)
    if isinstance(matcher, DualEncoder):
        for side in ("image", "text"):
            encoder, linear = getattr(matcher, f"{side}_encoder"), getattr(matcher, f"{side}_linear")
            if encoder.width != linear.in_features:
                raise ValueError(
                    f"IAIS relates words and image parts in one space, but the {side} parts of this dual encoder are {encoder.width} "
                    f"wide and its projection takes {linear.in_features}: choose an encoder whose parts and vector have one width "
                    "(hf_vision, pooled_gru)"
                )
        return lambda images, captions: _dual(matcher, images, captions)
    raise ValueError(
        f"IAIS needs relations among words and among regions, and {type(matcher).__name__} offers one vector a side: "
        "use uniter, a late-interaction matcher (scan, sgr, saf, uarda) or dual"
    )


def _joint(matcher: Any, images: Images, captions: Captions) -> tuple[Encoded, Encoded, Relations]:
    left, right = matcher.encode_images(images), matcher.encode_captions(captions)
    relations = matcher.pairs(left, right, torch.arange(len(left), device=captions.tokens.device)).relations
    return left, right, relations


def _late(matcher: Any, images: Images, captions: Captions, smoothing: float) -> tuple[Encoded, Encoded, Relations]:
    left, right = matcher.encode_images(images), matcher.encode_captions(captions)
    return left, right, cosine_relations(left, right, smoothing)


def _dual(matcher: Any, images: Images, captions: Captions) -> tuple[Encoded, Encoded, Relations]:
    left, image_parts = _with_parts(matcher.image_encoder, lambda: matcher.encode_images(images))
    right, words = _with_parts(matcher.text_encoder, lambda: matcher.encode_captions(captions))
    projected = Encoded(parts=matcher.image_linear(image_parts.parts), mask=_mask(image_parts))
    return left, right, cosine_relations(projected, Encoded(parts=matcher.text_linear(words.parts), mask=_mask(words)), COSINE_SMOOTHING)


def _with_parts(encoder: nn.Module, encode: Callable[[], Encoded]) -> tuple[Encoded, Encoded]:
    """What `encode` returns, and what the encoder inside it returned: parts that the dual encoder pools away."""
    seen: list[Encoded] = []
    hook = encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        return encode(), seen[0]
    finally:
        hook.remove()


def _mask(rows: Encoded) -> Tensor:
    assert rows.parts is not None
    return rows.mask if rows.mask is not None else rows.parts.new_ones(rows.parts.shape[:2], dtype=torch.bool)


def cosine_relations(images: Encoded, captions: Encoded, smoothing: float) -> Relations:
    """Extension: blocks of matchers without joint attention, rows = softmax of smoothing x cosine of parts.

    parts (G,R,D) and (G,L,D); start and end of a caption are left out. The parts of one side have not seen the other, so this is
    another hypothesis than the paper's.
    """
    (regions, region_mask), (tokens, mask) = parts_of(images), parts_of(captions)
    words, word_mask = F.normalize(tokens[:, 1:-1].float(), dim=-1), inner_words(mask)[:, 1:-1]
    regions = F.normalize(regions.float(), dim=-1)

    def block(rows: Tensor, columns: Tensor, row_mask: Tensor, column_mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = smoothing * rows @ columns.mT
        probabilities = logits.masked_fill(~column_mask[:, None], torch.finfo(logits.dtype).min).softmax(-1)
        return probabilities * (row_mask[:, :, None] & column_mask[:, None]), logits[:, None]

    among_words, word_logits = block(words, words, word_mask, word_mask)
    among_regions, region_logits = block(regions, regions, region_mask, region_mask)
    across, _ = block(words, regions, word_mask, region_mask)
    back, _ = block(regions, words, region_mask, word_mask)
    return Relations((among_words, among_regions, across, back), word_mask, region_mask, (word_logits, region_logits))
