"""The similarity vectors of SGR and SAF on a CPU, with a backward pass written by hand: nothing as large as images x words x width lives.

A difference of a word and its attended image vector is made where it is projected and made again where its gradient is, tile by tile;
kept are the attention weights and the unit vectors. Padded words are not projected at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from itm.matchers.norms import EPS

ROWS = 1024  # differences of one tile: 4 MB at width 1024


def unit_nodes(weights: Tensor, regions: Tensor, words: Tensor, layer: nn.Linear, mask: Tensor, glob: Tensor) -> Tensor:
    """(I,T,1+L,S): glob (I,T,S) first, then the unit vectors of layer((weights regions - words)^2), 0 where padded.

    weights (I,N,R), regions (I,R,D), words (N,D) of the N real words, in the order of mask (T,L).
    """
    found: Tensor = _Nodes.apply(weights, regions, words, layer.weight, layer.bias, F.pad(mask, (1, 0)), glob)
    return found


class _Nodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        weights, regions, words, weight, bias, mask, glob = given
        nodes = words.new_zeros(len(weights), *mask.shape, len(weight))
        nodes[:, :, 0] = glob
        found, places = nodes.flatten(1, 2), mask.flatten().nonzero().squeeze(1)
        norms, space = words.new_empty(weights.shape[:2]), _Space(words, weight)
        for images, own in _tiles(*weights.shape[:2]):
            squares = _differences(weights, regions, words, images, own, space).square_()
            projected = torch.addmm(bias, squares.flatten(0, 1), weight.T, out=space.projected[: squares.shape[0] * squares.shape[1]])
            length = torch.linalg.vector_norm(projected, dim=1)
            norms[images, own] = length.view(squares.shape[:2])
            found[images].index_copy_(1, places[own], projected.div_(length.add_(EPS)[:, None]).view(*squares.shape[:2], -1))
        ctx.save_for_backward(weights, regions, words, weight, places, nodes, norms)
        return nodes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, regions, words, weight, places, nodes, norms = ctx.saved_tensors
        glob, grad, found = grad[:, :, 0], grad.flatten(1, 2), nodes.flatten(1, 2)
        to_weights, to_regions, to_words = torch.empty_like(weights), torch.zeros_like(regions), torch.zeros_like(words)
        to_weight, to_bias, space = torch.zeros_like(weight), weight.new_zeros(len(weight)), _Space(words, weight)
        for images, own in _tiles(*weights.shape[:2]):
            slopes = _of_unit(grad[images].index_select(1, places[own]), found[images].index_select(1, places[own]), norms[images, own])
            flat = slopes.flatten(0, 1)
            difference = _differences(weights, regions, words, images, own, space).flatten(0, 1)
            second = space.second[: len(flat)]
            to_weight.addmm_(flat.T, torch.mul(difference, difference, out=second))
            to_bias += flat.sum(0)
            to_difference = torch.mm(flat, weight, out=second).mul_(difference.mul_(2)).view(*slopes.shape[:2], -1)
            to_words[own].sub_(to_difference.sum(0) if len(slopes) > 1 else to_difference[0])
            torch.bmm(to_difference, regions[images].mT, out=to_weights[images, own])
            to_regions[images].baddbmm_(weights[images, own].mT, to_difference)
        return to_weights, to_regions, to_words, to_weight, to_bias, None, glob


class _Space:
    """Memory of one tile, used for every tile: fresh memory costs as much as what is computed in it beside the products."""

    def __init__(self, words: Tensor, weight: Tensor) -> None:
        self.first, self.second = words.new_empty(2, ROWS, words.shape[1])
        self.projected = words.new_empty(ROWS, len(weight))


def _tiles(images: int, words: int) -> Iterator[tuple[slice, slice]]:
    """At most ROWS differences each."""
    if words > ROWS:
        parts = -(-words // ROWS)
        size = -(-words // parts)
        yield from ((slice(i, i + 1), slice(k, k + size)) for i in range(images) for k in range(0, words, size))
    else:
        together = max(1, ROWS // words)
        yield from ((slice(i, i + together), slice(None)) for i in range(0, images, together))


def _differences(weights: Tensor, regions: Tensor, words: Tensor, images: slice, own: slice, space: _Space) -> Tensor:
    """(i,n,D) of one tile, in the first space."""
    chosen = weights[images, own]
    out = space.first[: chosen.shape[0] * chosen.shape[1]].view(*chosen.shape[:2], -1)
    return torch.bmm(chosen, regions[images], out=out).sub_(words[own])


def _of_unit(grad: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """Gradient of x / (||x|| + EPS) by x, from that by its value `unit`; norms ||x||, at 0 without gradient of their own."""
    whole = (norms + EPS)[..., None]
    inner = (grad * unit).sum(-1, keepdim=True) * torch.where(norms[..., None] > 0, whole / norms[..., None], 0.0)
    return torch.addcmul(grad, unit, inner, value=-1).div_(whole)
