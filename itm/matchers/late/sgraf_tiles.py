"""SGR and SAF scores without gradient: one image against captions of one length, so that what is built stays in the cache.

The same numbers as the plain form up to rounding (docs/methods/sgraf.md#exact-transformations, items 1 to 6).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itm.matchers.late.base import gram, parts_of
from itm.matchers.late.tiles import attended_squares, equal_lengths, form_of, product, product_dtype
from itm.matchers.norms import EPS
from itm.types import Encoded

LAMBDA = 9.0
# Words of one tile; the difference of each to its attended image vector is as wide as the parts.
WORDS = {"cpu": 1024, "cuda": 1 << 14}
NODES = {"cpu": 1 << 12, "cuda": 1 << 18}


def unit_weights(raw: Tensor, grams: Tensor, region_mask: Tensor | None) -> Tensor:
    """(I,R,L,T) raw scores -> weights such that weights @ regions are unit vectors (docs/methods/sgraf.md#text-to-image-attention)."""
    weights = F.leaky_relu(raw, 0.1)
    weights.mul_(LAMBDA / weights.square().sum(2, keepdim=True).sqrt_().add_(EPS)).exp_()
    if region_mask is not None:
        weights.mul_(region_mask[:, :, None, None])
    weights.div_(weights.sum(1, keepdim=True))
    return weights.div_(attended_squares(weights, grams).sqrt_().add_(EPS).unsqueeze(1))


class Scorer(Protocol):
    """What is used of SGR and SAF."""

    fuse_tiles: bool
    sim_tranloc_w: nn.Linear
    sim_tranglo_w: nn.Linear

    def read_unmasked(self, nodes: Tensor) -> Tensor:
        """Unit nodes (P,K,S) in the type of the products, all real, the global one first -> scores (P,) at least float32."""
        ...


def tiled_scores(matcher: Scorer, images: Encoded, captions: Encoded, whole_images: Tensor, whole_captions: Tensor) -> Tensor:
    """(I,T) of a matcher whose pairs do not depend on each other, with the global vectors (I,D), (T,D)."""
    (regions, region_mask), (words, word_mask) = parts_of(images), parts_of(captions)
    device, kind = regions.device.type, product_dtype(regions)
    scores = regions.new_empty(len(images), len(captions))
    with torch.autocast(device, enabled=False):
        block = _Block(matcher, kind, regions, region_mask)
        for chosen, length in equal_lengths(word_mask, WORDS.get(device, 1024)):
            texts = words.transpose(0, 1)[:length, chosen].flatten(0, 1)
            together = max(1, NODES.get(device, 1 << 14) // ((length + 1) * len(chosen)))
            for start in range(0, len(images), together):
                rows = slice(start, min(start + together, len(images)))
                attended = block.attention(texts, rows, length)
                local = block.local(texts.to(kind), attended, rows, max(1, WORDS.get(device, 1024) // len(texts)))
                glob = (whole_images[rows, None] - whole_captions[None, chosen]).square_().to(kind).flatten(0, 1)
                nodes = _nodes(block.glob(glob), local, length, len(chosen))
                scores[rows, chosen] = matcher.read_unmasked(nodes).view(-1, len(chosen)).to(scores.dtype)
    return scores


class _Block:
    """The weights in the type of the products, and what is known of the images."""

    def __init__(self, matcher: Scorer, kind: torch.dtype, regions: Tensor, region_mask: Tensor) -> None:
        self.matcher, self.kind = matcher, kind
        self.regions, self.grams = regions.to(kind), gram(regions)
        self.mask = None if bool(region_mask.all()) else region_mask

    def glob(self, x: Tensor) -> Tensor:
        return linear(x, self.matcher.sim_tranglo_w)

    def attention(self, texts: Tensor, rows: slice, length: int) -> Tensor:
        """texts (L*T,D), word by word -> weights (I,L*T,R) such that weights @ regions are unit vectors."""
        ours = self.regions[rows]
        raw = product(ours.flatten(0, 1), texts.to(self.kind)).to(self.grams.dtype).view(*ours.shape[:2], length, -1)
        weights = form_of(unit_weights, self.matcher.fuse_tiles)(raw, self.grams[rows], None if self.mask is None else self.mask[rows])
        return weights.flatten(2).mT.to(self.kind)

    def local(self, texts: Tensor, weights: Tensor, rows: slice, together: int) -> Tensor:
        """(I,L*T,S): squared differences, projected `together` images at a time."""
        found = []
        for ours, regions in zip(weights.split(together), self.regions[rows].split(together), strict=True):
            difference = texts.new_empty(len(ours), *texts.shape)
            for own, parts, out in zip(ours, regions, difference, strict=True):
                torch.mm(own, parts, out=out).sub_(texts).square_()
            found.append(linear(difference.flatten(0, 1), self.matcher.sim_tranloc_w))
        return torch.cat(found).view(len(weights), len(texts), -1)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """(M,K) -> layer(x) in the type of x, without gradient."""
    return product(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _nodes(glob: Tensor, local: Tensor, length: int, captions: int) -> Tensor:
    """glob (I*T,S), local (I,L*T,S) -> unit nodes (I*T,1+L,S), in the type of the products."""
    images, width = len(local), local.shape[2]
    nodes = local.new_empty(images, captions, length + 1, width)
    nodes[:, :, 0] = glob.view(images, captions, width)
    nodes[:, :, 1:] = local.view(images, length, captions, width).transpose(1, 2)
    nodes = nodes.flatten(0, 1)
    wide = nodes if nodes.dtype != torch.bfloat16 else nodes.float()
    return nodes.div_(wide.square().sum(-1, keepdim=True).sqrt_().add_(EPS))
