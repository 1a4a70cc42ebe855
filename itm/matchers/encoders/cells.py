"""The grid cells of an image tower as parts: averaged to fewer, placed in the photo, and read back where they were computed before."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from itm.matchers.norms import masked_mean
from itm.types import Encoded, Images


def averaged(parts: Tensor, cells: int | None) -> Tensor:
    """(N,K,D) cells of a square grid in raster order -> (N,cells*cells,D), each the mean of those it covers; None = as they are.

    Raises ValueError for parts that are no square grid, and for more cells a side than there are.
    """
    if cells is None:
        return parts
    side = math.isqrt(parts.shape[1])
    if side * side != parts.shape[1]:
        raise ValueError(f"option cells needs a square grid, and this tower gives {parts.shape[1]} parts: leave it out")
    if not 1 <= cells <= side:
        raise ValueError(f"cells={cells}: this tower gives {side} x {side} cells, choose 1 to {side}")
    grid = parts.transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(grid, cells).flatten(2).transpose(1, 2)


def read_back(images: Images, width: int) -> Encoded:
    """What a frozen tower gave earlier, from region files: parts (N,K,width) and their mean. Raises ValueError for another width."""
    regions, mask = images.regions, images.mask
    if regions is None or regions.shape[-1] != width:
        held = "no features" if regions is None else f"features {regions.shape[-1]} wide"
        raise ValueError(f"the data hold {held}, this image tower gives {width}: run `itm features` with model.options.image")
    if mask is None:
        mask = regions.new_ones(regions.shape[:2]).bool()
    return Encoded(vector=masked_mean(regions, mask), parts=regions, mask=mask)
