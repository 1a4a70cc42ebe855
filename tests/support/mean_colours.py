"""An image encoder without weights: its cells are the mean colours of a grid, so that what it must give can be told by eye."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from itm.matchers.encoders.build import Encoder
from itm.types import Encoded, Images


class MeanColours(Encoder):
    """parts (N, cells*cells, 3): mean red, green and blue of each cell, 0 to 1."""

    width = vector_width = 3

    def __init__(self, *, cells: int = 4) -> None:
        super().__init__()
        self.options = {"cells": cells}
        self.cells = cells

    def forward(self, images: Images) -> Encoded:
        assert images.pixels is not None
        parts = F.adaptive_avg_pool2d(images.pixels.float() / 255, self.cells).flatten(2).transpose(1, 2)
        return Encoded(vector=parts.mean(1), parts=parts, mask=torch.ones(parts.shape[:2], dtype=torch.bool))
