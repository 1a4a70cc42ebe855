"""Precomputed region features as image parts: one linear layer and SCAN's l2 norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itm.matchers.encoders.build import Encoder
from itm.matchers.norms import l2, masked_mean, xavier
from itm.types import Encoded, Images


class GainLinear(nn.Module):
    """Weight-normalised linear layer with one gain for the whole matrix: W = g v / ||v||_F (docs/methods/scan.md#image-encoder)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(outside).uniform_(-1, 1) / math.sqrt(inside))
        self.weight_v = nn.Parameter(torch.empty(outside, inside).uniform_(-1, 1) / math.sqrt(inside))
        self.weight_g = nn.Parameter(self.weight_v.detach().norm())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm()), self.bias)


class RegionProjection(Encoder):
    """parts (N,R,width) = l2(Lin(regions)), vector (N,width) = their mean over real regions. Reads `Images.regions` and `Images.mask`.

    normalize=False leaves out the l2 norm (`no_imgnorm`); weight_norm=True is SCAN's `precomp_enc_type=weight_norm`.
    """

    unit_parts = True

    def __init__(self, *, in_width: int = 2048, width: int = 1024, normalize: bool = True, weight_norm: bool = False) -> None:
        super().__init__()
        self.options = {"in_width": in_width, "width": width, "normalize": normalize, "weight_norm": weight_norm}
        self.fc = GainLinear(in_width, width) if weight_norm else xavier(in_width, width)
        self.in_width, self.normalize = in_width, normalize
        self.width = self.vector_width = width

    def forward(self, images: Images) -> Encoded:
        """Raises ValueError for images without regions or with features of another width."""
        if images.regions is None:
            raise ValueError(
                "this model reads precomputed regions, the data hold none: set data.image=regions or another model.options.image"
            )
        regions = images.regions.to(self.fc.bias.dtype)
        if regions.shape[-1] != self.in_width:
            raise ValueError(f"regions are {regions.shape[-1]} wide, the model takes {self.in_width}: set model.options.image.in_width")
        mask = images.mask if images.mask is not None else regions.new_ones(regions.shape[:2], dtype=torch.bool)
        parts = self.fc(regions)
        parts = (l2(parts) if self.normalize else parts).masked_fill(~mask.unsqueeze(-1), 0.0)
        return Encoded(vector=masked_mean(parts, mask), parts=parts, mask=mask)
