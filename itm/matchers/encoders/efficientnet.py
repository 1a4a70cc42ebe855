"""EfficientNet-Lite0 as a grid encoder, its architecture and its ImageNet weights from two packages of the extra `real`."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from itm.matchers.encoders.build import Encoder
from itm.matchers.encoders.cells import averaged, read_back
from itm.matchers.encoders.towers import Normalise
from itm.packaged import ARCHITECTURE, EFFICIENTNET, folder_of
from itm.types import Encoded, Images

WIDTH, STRIDE = 1280, 32
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # of (x - 127) / 128 of bytes, as the weights were trained


def network(image_size: int, pretrained: bool) -> nn.Module:
    """The convolutions up to the last grid, without the classifier. image_size: its padding is made for one size.

    Raises ValueError with the pip line where a package is missing.
    """
    folder_of(ARCHITECTURE, "efficientnet_lite0")
    architecture: Any = import_module(ARCHITECTURE)
    model: nn.Module = architecture.EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
    del model._fc, model._dropout
    if pretrained:
        (file,) = (folder_of(EFFICIENTNET, "efficientnet_lite0") / "models").glob("*.pth")
        weights = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("_fc.")})
    return model


class EfficientNetLite0(Encoder):
    """parts = the cells of the last grid (N, K, 1280), 7 x 7 of 224 pixels, or `cells` x `cells` means of them; vector = their mean.

    pretrained: ImageNet weights from the package; a matcher folder holds its own. Frozen, it also takes features that `itm features`
    stored, in place of pixels.
    """

    width = vector_width = WIDTH

    def __init__(self, *, cells: int | None = None, freeze: bool = False, pretrained: bool = True, image_size: int = 224) -> None:
        """Raises ValueError where a package of the extra `real` is missing, and for sizes that do not fit."""
        super().__init__()
        self.options = {"cells": cells, "freeze": freeze, "pretrained": False, "image_size": image_size}
        if cells is not None and not 1 <= cells <= math.ceil(image_size / STRIDE):
            raise ValueError(f"cells={cells}: of {image_size} pixels there are {math.ceil(image_size / STRIDE)} cells a side")
        self.model = network(image_size, pretrained).requires_grad_(not freeze).train(not freeze)
        self.normalise = Normalise(MEAN, STD)
        self.cells, self.frozen, self.image_size = cells, freeze, image_size

    @property
    def reads_features(self) -> bool:
        return self.frozen

    def train(self, mode: bool = True) -> EfficientNetLite0:
        if not self.frozen:
            return super().train(mode)
        self.training = mode  # the model stays as in evaluation
        return self

    def forward(self, images: Images) -> Encoded:
        """Raises ValueError when the pixels are not `image_size` a side."""
        if self.frozen and images.pixels is None and images.regions is not None:
            return read_back(images, WIDTH)
        pixels = self.normalise(images)
        if pixels.shape[-1] != self.image_size:
            raise ValueError(
                f"efficientnet_lite0 for {self.image_size} pixels a side got {pixels.shape[-1]}: set its image_size to data.image_size"
            )
        model: Any = self.model
        grid: Tensor = model.extract_features(pixels)
        parts = averaged(grid.flatten(2).transpose(1, 2), self.cells)
        return Encoded(vector=parts.mean(1), parts=parts, mask=parts.new_ones(parts.shape[:2], dtype=torch.bool))
