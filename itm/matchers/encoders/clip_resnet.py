"""The convolutional image tower of OpenAI's ResNet CLIPs (RN50, RN101, RN50x4, ...), under its released names.

Sizes and equations: docs/methods/dual.md#resnets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 32
"""Pixels of an image beside one cell of the last grid."""
EXPANSION = 4
"""Channels that a block gives, over those of its inner convolution."""


class Bottleneck(nn.Module):
    """A residual block. All convolutions have stride 1; where it shrinks the grid, an average pooling does."""

    def __init__(self, inside: int, planes: int, stride: int) -> None:
        super().__init__()
        outside, self.stride = planes * EXPANSION, stride
        self.conv1, self.bn1 = nn.Conv2d(inside, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, outside, 1, bias=False), nn.BatchNorm2d(outside)
        other = stride > 1 or inside != outside
        self.downsample = nn.ModuleDict({"0": nn.Conv2d(inside, outside, 1, bias=False), "1": nn.BatchNorm2d(outside)}) if other else None

    def forward(self, grid: Tensor) -> Tensor:
        """(N,C,h,w) -> (N,4*planes,h/stride,w/stride)."""
        inner = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(grid))))))
        if self.stride > 1:
            inner, grid = F.avg_pool2d(inner, self.stride), F.avg_pool2d(grid, self.stride)
        if self.downsample is not None:
            grid = self.downsample["1"](self.downsample["0"](grid))
        return F.relu(self.bn3(self.conv3(inner)) + grid)


class AttentionPooling(nn.Module):
    """One vector of a grid: attention of its mean over the mean and all cells, each with a position of its own."""

    def __init__(self, cells: int, width: int, heads: int, projection: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(cells + 1, width) / width**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, projection)

    def forward(self, grid: Tensor) -> Tensor:
        """(N,D,h,w) -> (N,projection)."""
        cells = grid.flatten(2).transpose(1, 2)
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1) + self.positional_embedding
        q, k, v = (
            layer(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, rows in ((self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


class CLIPResNet(nn.Module):
    """Three stem convolutions, four stages of bottlenecks, attention pooling.

    layers: blocks of each stage; width: channels of the stem (64 of RN50), of which the last grid has 32 times as many.
    """

    def __init__(self, *, layers: Sequence[int], width: int, heads: int, image_size: int, projection: int) -> None:
        """Raises ValueError for sizes that make no such tower."""
        super().__init__()
        if len(layers) != 4 or min(layers) < 1 or width % 2 or image_size % STRIDE or (STRIDE * width) % heads:
            raise ValueError(
                f"resnet: layers={list(layers)} must be four stages, width={width} even, image_size={image_size} a multiple of {STRIDE}, "
                f"and heads={heads} must divide {STRIDE} * width"
            )
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        inside = width
        for stage, blocks in enumerate(layers):
            planes = width * 2**stage
            first = Bottleneck(inside, planes, stride=2 if stage else 1)
            inside = planes * EXPANSION
            rest = (Bottleneck(inside, planes, stride=1) for _ in range(blocks - 1))
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.attnpool = AttentionPooling((image_size // STRIDE) ** 2, inside, heads, projection)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N,3,S,S) float, normalised -> (N,projection)."""
        grid = pixel_values
        for number in (1, 2, 3):
            grid = F.relu(self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(grid)))
        grid = F.avg_pool2d(grid, 2)
        for stage in (1, 2, 3, 4):
            grid = self.get_submodule(f"layer{stage}")(grid)
        return self.attnpool(grid)
