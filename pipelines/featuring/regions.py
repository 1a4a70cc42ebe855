"""One photo's regions from its grid of cells: the cells themselves, or what of them lies in a detector's boxes."""

from __future__ import annotations

import math

import numpy as np

from itm.data.preprocess import ImageInput, framed
from itm.data.records import Regions
from pipelines.featuring.boxes import cut, usable


def cell_boxes(cells: int, width: int, height: int, image: ImageInput) -> np.ndarray:
    """(cells*cells, 4) float32: x1 y1 x2 y2 of the cells of a grid in raster order, in pixels of a photo that was prepared as `image`."""
    left, top, right, bottom = framed(width, height, image.size, image.crop)
    across, down = np.linspace(left, right, cells + 1) * width, np.linspace(top, bottom, cells + 1) * height
    rows = [(across[c], down[r], across[c + 1], down[r + 1]) for r in range(cells) for c in range(cells)]
    return np.array(rows, np.float32)


def side_of(parts: int) -> int:
    """Cells a side of a square grid. Raises ValueError for what is none: nobody knows where its parts lie."""
    side = math.isqrt(parts)
    if side * side != parts:
        raise ValueError(f"the encoder gives {parts} parts, which are no square grid: choose one of patches or grid cells")
    return side


def grid_regions(features: np.ndarray, width: int, height: int, image: ImageInput, whole: bool) -> Regions:
    """features (K,D) of the cells -> regions with boxes in pixels of the photo. whole: they are stored as float32."""
    side = side_of(len(features))
    return Regions(features, cell_boxes(side, width, height, image), width, height, whole=whole)


def box_regions(
    features: np.ndarray, boxes: np.ndarray, conf: np.ndarray | None, size: tuple[int, int], image: ImageInput, whole: bool
) -> tuple[Regions, int]:
    """features (K,D) of the cells -> for each usable box the mean of the cells that it covers, weighted by area; and how many were not.

    size: width and height of the photo in pixels. Raises ValueError where no box can be used.
    """
    width, height = size
    good = usable(boxes, width, height)
    lost = int((~good).sum())
    if lost == len(boxes):
        raise ValueError(f"none of its {len(boxes)} boxes lies inside its {width} x {height} pixels")
    kept = cut(boxes[good], width, height)
    grid = cell_boxes(side_of(len(features)), width, height, image)
    corners = np.minimum(kept[:, None, 2:], grid[None, :, 2:]) - np.maximum(kept[:, None, :2], grid[None, :, :2])
    shared = corners.clip(min=0).prod(2)
    weights = shared / shared.sum(1, keepdims=True)
    found = (weights @ features).astype(np.float32)
    return Regions(found, kept, width, height, None if conf is None else conf[good], whole), lost
