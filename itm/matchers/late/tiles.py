"""Late interaction without gradient, in tiles that stay in the cache: captions of one length against a block of images.

The numbers are those of the plain form up to rounding (docs/methods/scan.md#exact-shortcuts). Nothing is padded on the word side, so
nothing needs a mask there; scores lie as (context rows, context items, query items, query rows), so that every sum runs over an outer axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import ParamSpec

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.device import keep_kernels_apart
from itm.matchers.late.base import gram, parts_of
from itm.types import Encoded

# Raw scores of one tile: some MB, which the last cache of a CPU holds three times and a product works well with, or enough for a GPU.
TILE_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}
IMAGES = {"cpu": 80, "cuda": 512}
ALIGNED = 16  # columns that the kernels of a CPU take at once; others cost up to a tenth more

Relate = Callable[[Tensor, Tensor, Tensor | None], Tensor]
P = ParamSpec("P")


def form_of(function: Callable[P, Tensor], fused: bool) -> Callable[P, Tensor]:
    """A function of tensors and numbers without side effects as it is written, or as torch.compile makes it: one pass over a tile where
    eager code makes ten."""
    return _fused(function) if fused else function


@functools.cache
def _fused(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    keep_kernels_apart()
    return torch.compile(function, dynamic=True)


def can_tile(captions: Encoded) -> bool:
    """No gradient is wanted, and the words of every caption stand at its beginning."""
    _, mask = parts_of(captions)
    return not torch.is_grad_enabled() and bool((mask[:, :-1] >= mask[:, 1:]).all())


def product_dtype(parts: Tensor) -> torch.dtype:
    """What autocast would multiply in, else the type of the parts. Sums and norms are at least float32 in any case."""
    kind = parts.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parts.dtype


@functools.cache
def has_product(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of this type here, found out by one small product.

    Its flags describe the CPU: under ONEDNN_MAX_CPU_ISA they promise what the library then refuses.
    """
    ones = torch.ones(16, 16, dtype=dtype)
    try:
        torch.ops.mkldnn._linear_pointwise(ones, ones, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """(M,K), (N,K) -> left right' + bias, without gradient; on CPUs by oneDNN, whose float32 kernels use all that the CPU has.

    Where oneDNN has no kernel for the type, as for bfloat16 on a CPU with AVX2 only, torch multiplies.
    """
    if left.device.type == "cpu" and has_product(left.dtype):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
        return found
    return F.linear(left, right, bias)


def equal_lengths(mask: Tensor, most_words: int) -> Iterator[tuple[Tensor, int]]:
    """(caption rows, their common length): at most `most_words` words, or one caption, at a time; full ones hold a multiple of ALIGNED."""
    lengths = mask.sum(1)
    order = lengths.argsort(stable=True)
    values, counts = torch.unique_consecutive(lengths[order], return_counts=True)
    for rows, length in zip(order.split(counts.tolist()), values.tolist(), strict=True):
        most, even = max(1, most_words // length), ALIGNED // math.gcd(ALIGNED, length)
        for chosen in rows.split(most - most % even if most > even else most):
            yield chosen, length


def tiled_relevance(
    images: Encoded, captions: Encoded, direction: str, relate: Relate, context_first: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(image rows, caption rows, related (...,Nc,Nq,Q), query mask (Nq,Q)) of every tile; t2i: words ask regions, i2t: regions ask words.

    relate(raw (Nc,C,Q,Nq), grams (Nc,C,C), context mask (Nc,C) or None when all are real) -> related (...,Nc,Q,Nq).
    context_first: raw lies (C,Nc,Q,Nq), so that a query item is one column of a matrix, in tiles of few contexts with many queries each.
    """
    (regions, region_mask), (words, word_mask) = parts_of(images), parts_of(captions)
    device, kind, t2i = regions.device.type, product_dtype(regions), direction == "t2i"
    block = _even(len(images), IMAGES.get(device, 32) // (2 if context_first and t2i else 1))
    most = max(1, TILE_SCORES.get(device, 1 << 18) // (block * regions.shape[1]))
    with torch.autocast(device, enabled=False):
        image_grams = gram(regions) if t2i else regions
        seen = None if bool(region_mask.all()) else region_mask
        blocks = [(slice(i, i + block), part) for i, part in zip(range(0, len(images), block), regions.to(kind).split(block), strict=True)]
        if context_first or not t2i:  # turned once, and not for every tile
            blocks = [(rows, part.transpose(0, 1).contiguous()) for rows, part in blocks]
        for chosen, length in equal_lengths(word_mask, most):
            texts = words[chosen, :length]
            grams = None if t2i else gram(texts)
            texts = texts.transpose(0, 1) if t2i or context_first else texts
            flat = texts.to(kind).flatten(0, 1)
            for rows, ours in blocks:
                if t2i:
                    raw = product(ours.flatten(0, 1), flat).to(regions.dtype).view(*ours.shape[:2], length, len(chosen))
                    found = relate(raw, image_grams[rows], None if seen is None else seen[rows])
                    yield rows, chosen, found.mT, word_mask[chosen, :length]
                else:
                    assert grams is not None
                    raw = product(flat, ours.flatten(0, 1)).to(regions.dtype).view(*texts.shape[:2], *ours.shape[:2])
                    yield rows, chosen, relate(raw, grams, None).mT, region_mask[rows]


def _even(rows: int, most: int) -> int:
    """The size of the blocks, at most `most`, that leave no small rest of the rows."""
    return math.ceil(rows / math.ceil(rows / most))


def attended_squares(weights: Tensor, grams: Tensor) -> Tensor:
    """w' G w of every query item: weights (Nc,C,Q,Nq), grams (Nc,C,C) -> (Nc,Q,Nq); at least 0."""
    flat = weights.flatten(2)
    return (grams @ flat).mul_(flat).sum(1).clamp_(min=0).view(weights.shape[0], *weights.shape[2:])
