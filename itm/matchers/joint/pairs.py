"""Joint sequences of text-image pairs and the four relation blocks of an attention layer.

A joint sequence is the padded text (start, words, end) followed by the padded regions; only text carries positions, so moving the
regions directly behind the text (the compact layout) changes no score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from itm.types import Encoded


@dataclass(frozen=True)
class Relations:
    """Attention blocks of G pairs, each normalised over itself, head mean, zero on padding.

    blocks = LL (G,n,n), VV (G,m,m), LV (G,n,m), VL (G,m,n); word_mask (G,n), region_mask (G,m) bool;
    logits = the scaled raw products (G,h,n,n) among words and (G,h,m,m) among regions.
    """

    blocks: tuple[Tensor, Tensor, Tensor, Tensor]
    word_mask: Tensor
    region_mask: Tensor
    logits: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pairs:
    """scores (N,) of row-aligned pairs, and the relation blocks of the rows asked for (None when none were)."""

    scores: Tensor
    relations: Relations | None = None


def inner_words(mask: Tensor) -> Tensor:
    """(N,L) bool: the tokens between the first and the last real one (start and end of a caption); mask is a prefix of True."""
    inner = torch.zeros_like(mask)
    inner[:, 1:-1] = mask[:, 2:]
    return inner


def parts_of(rows: Encoded) -> tuple[Tensor, Tensor]:
    """(parts, mask) of an encoding that has both."""
    assert rows.parts is not None
    assert rows.mask is not None
    return rows.parts, rows.mask


def joint_sequence(images: Encoded, captions: Encoded) -> tuple[Tensor, Tensor]:
    """Row-aligned text then regions: (N,L+R,H) and its mask (N,L+R) bool."""
    (words, word_mask), (regions, region_mask) = parts_of(captions), parts_of(images)
    return torch.cat([words, regions], 1), torch.cat([word_mask, region_mask], 1)


def compact(joint: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Real positions first, in order, cut to the longest row: (N,Lc,H) and a prefix mask (N,Lc)."""
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return joint.gather(1, order[..., None].expand(-1, -1, joint.shape[-1])), mask.gather(1, order)


def relation_blocks(attention: Any, hidden: Tensor, masks: tuple[Tensor, Tensor], text_width: int) -> Relations:
    """The blocks of a BERT self-attention (with `query`, `key`, `num_attention_heads`) from its input `hidden` (G,L+R,H).

    S_xy = mean over heads of softmax over y of q_x k_y / sqrt(d): softmax inside the block first, then heads; no dropout; float32
    (float64 stays). masks = text mask (G,L) with start and end, region mask (G,R); text_width = L.
    """
    word_mask, region_mask = inner_words(masks[0])[:, 1:-1], masks[1]
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        query, key = (_heads(layer(hidden), attention.num_attention_heads) for layer in (attention.query, attention.key))
        logits = query @ key.mT / query.shape[-1] ** 0.5
    words, regions = slice(1, max(text_width - 1, 1)), slice(text_width, None)
    return Relations(
        blocks=(
            _block(logits[:, :, words, words], word_mask, word_mask),
            _block(logits[:, :, regions, regions], region_mask, region_mask),
            _block(logits[:, :, words, regions], word_mask, region_mask),
            _block(logits[:, :, regions, words], region_mask, word_mask),
        ),
        word_mask=word_mask,
        region_mask=region_mask,
        logits=(logits[:, :, words, words], logits[:, :, regions, regions]),
    )


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _block(logits: Tensor, row_mask: Tensor, column_mask: Tensor) -> Tensor:
    # A finite fill, not -inf: a row without any valid column becomes 0 by the mask instead of NaN with a NaN gradient.
    columns = column_mask[:, None, None]
    probabilities = logits.masked_fill(~columns, torch.finfo(logits.dtype).min).softmax(-1).mean(1)
    return probabilities * (row_mask[:, :, None] & column_mask[:, None])
