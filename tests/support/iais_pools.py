"""The half step of IAIS as its authors take it, on one positive and its pool: what the method is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from itm.methods.iais import IAIS
from itm.methods.iais_mining import mining_mode
from itm.types import Captions, Images, Matcher


def hardest_of_pool(matcher: Matcher, images: Images, captions: Captions, keep: int) -> Tensor:
    """Rows of a pool to train on, (1+keep,) int64: row 0 (the positive), then the negatives with the highest raw scores.

    One side has one row, the other is the pool with the positive first. Raises ValueError for any other shape.
    """
    if len(images) != 1 and len(captions) != 1:
        raise ValueError(f"a pool is one caption with many images or one image with many captions, not {len(images)} x {len(captions)}")
    with mining_mode(matcher):
        scores = matcher.score(matcher.encode_images(images), matcher.encode_captions(captions)).flatten()
    negatives = scores[1:].topk(min(keep, len(scores) - 1)).indices + 1
    return torch.cat([negatives.new_zeros(1), negatives])


def pool_step(method: IAIS, images: Images, captions: Captions, step: int = 0) -> dict[str, Tensor]:
    """The two weighted terms of one half: 1 caption x (1+pool) images (text-anchored), or 1 image x (1+pool) captions (image-anchored);
    row 0 of the pool is the positive."""
    rows = hardest_of_pool(method.matcher, images, captions, method.ranking.hard_negatives)
    anchor = "L" if len(captions) == 1 else "V"
    images, captions = (images[rows], captions) if anchor == "L" else (images, captions[rows])
    columns = torch.arange(len(rows), device=rows.device)[None]
    encoded = method.matcher.encode_images(images), method.matcher.encode_captions(captions)
    return method._half(anchor, *encoded, (columns, torch.ones_like(columns[:, 1:], dtype=torch.bool)), step)
