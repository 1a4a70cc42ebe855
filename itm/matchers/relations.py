"""Relation blocks for matchers without joint attention, from cosines of their parts (an extension of IAIS).

The parts of one side have not seen the other, so this is another hypothesis than the paper's (docs/methods/iais.md#other-architectures).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.matchers.joint.pairs import inner_words, parts_of
from itm.types import Encoded, Relations

COSINE_SMOOTHING = 9.0  # SCAN's lambda_softmax for attention between words and regions


def cosine_relations(images: Encoded, captions: Encoded, smoothing: float) -> Relations:
    """Rows = softmax of smoothing x cosine of parts; parts (G,R,D) and (G,L,D). Start and end of a caption are left out."""
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
