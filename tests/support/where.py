"""A matcher whose scores tell where they were computed."""

from __future__ import annotations

import os

import torch

from itm.types import Encoded, Matcher


class Where(Matcher):
    """Every score is the number of the process that gave it."""

    def score(self, images: Encoded, captions: Encoded) -> torch.Tensor:
        return torch.full((len(images), len(captions)), float(os.getpid()))
