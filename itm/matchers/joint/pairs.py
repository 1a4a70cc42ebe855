"""Joint sequences of text-image pairs and the four relation blocks of an attention layer.

A joint sequence is the padded text (start, words, end) followed by the padded regions; only text carries positions, so moving the
regions directly behind the text (the compact layout) changes no score.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from itm.types import Encoded, Relations


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


def scaled_products(hidden: Tensor, query: nn.Module, key: nn.Module, heads: int) -> Tensor:
    """(G,heads,L,L) q k' / sqrt(d) of an attention layer from its input (G,L,H); at least float32 whatever the autocast, no dropout."""
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        queries, keys = (_heads(layer(hidden), heads) for layer in (query, key))
        return queries @ keys.mT / queries.shape[-1] ** 0.5


def relation_blocks(logits: Tensor, masks: tuple[Tensor, Tensor], text_width: int) -> Relations:
    """The blocks of the `scaled_products` (G,h,L+R,L+R) of joint sequences whose first `text_width` = L places are text.

    S_xy = mean over heads of softmax over y of q_x k_y / sqrt(d): softmax inside the block first, then heads.
    masks = text mask (G,L) with start and end, region mask (G,R).
    """
    word_mask, region_mask = inner_words(masks[0])[:, 1:-1], masks[1]
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
