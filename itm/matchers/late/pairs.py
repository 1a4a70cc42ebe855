"""Chosen pairs with gradient, packed: what a loss that reaches few of the pairs needs beside all scores without gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from itm.matchers.late.base import parts_of
from itm.matchers.rows import take
from itm.types import Encoded, SplitScore

WORDS = 4096  # of one chunk of pairs, padded ones included; each is as wide as the parts in every tensor that is kept


class _Products(torch.autograd.Function):
    """left right' of (n,L,D), (n,R,D) with gradients that lie as the two do: rows that lie across are added up number by number."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        left, right = ctx.saved_tensors
        return grad @ right, grad.mT @ left


class PairRows(NamedTuple):
    """n pairs: their rows image, caption (n,) int64, and their parts: regions (n,R,D), words (n,L,D), each with its mask."""

    image: Tensor
    caption: Tensor
    regions: Tensor
    region_mask: Tensor
    words: Tensor
    word_mask: Tensor

    @property
    def raw(self) -> Tensor:
        """(n,1,L,R) inner products of the words of a pair with its regions: the form of `base.raw_scores`, one query row each."""
        found: Tensor = _Products.apply(self.words, self.regions)
        return found.unsqueeze(1)


def split_by(scores: Tensor, score: Callable[[PairRows], Tensor], images: Encoded, captions: Encoded, again: bool) -> SplitScore:
    """All scores, and `score` of chosen pairs; see `score_pairs`."""
    return SplitScore(scores, lambda rows, columns: score_pairs(score, images, captions, rows, columns, again))


def score_pairs(
    score: Callable[[PairRows], Tensor], images: Encoded, captions: Encoded, rows: Tensor, columns: Tensor, again: bool = False
) -> Tensor:
    """(P,) scores of the pairs (rows, columns), which `score` gives chunk by chunk. again: run it again in the backward pass."""
    (regions, region_mask), (words, word_mask) = parts_of(images), parts_of(captions)
    lengths = word_mask.sum(1)[columns]
    order = lengths.argsort(descending=True, stable=True)
    found = []
    for chosen in like_length(order, lengths[order].tolist(), WORDS):
        image, caption, longest = rows[chosen], columns[chosen], int(lengths[chosen[0]])
        own = take(words[:, :longest], caption), word_mask[caption, :longest]
        pairs = PairRows(image, caption, take(regions, image), region_mask[image], *own)
        found.append(checkpoint(score, pairs, use_reentrant=False) if again else score(pairs))
    return torch.cat(found)[order.argsort()]


def like_length(order: Tensor, lengths: list[int], budget: int) -> list[Tensor]:
    """Rows of `order` (longest first) cut where they would hold more than `budget` words, or padding 15 % of a chunk."""
    starts = [0]
    for end, length in enumerate(lengths):
        longest = lengths[starts[-1]]
        wide = (end + 1 - starts[-1]) * longest > budget
        padded = (end + 1 - starts[-1]) * longest > 1024 and length < 0.7 * longest
        if end > starts[-1] and (wide or padded):
            starts.append(end)
    return [order[a:b] for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True)]
