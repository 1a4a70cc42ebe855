"""The sigmoid term: each pair of a batch is a question of its own, with a scale and a bias that are learned (SigLIP).

Equations: docs/methods/dual.md#sigmoid-loss. Zhai et al., ICCV 2023, arXiv 2303.15343.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itm.config import Strict
from itm.methods.terms import Term


class SigmoidOptions(Strict):
    """`scale` is the start of t and `bias` that of b in t * score + b; learn: whether they move."""

    weight: float = 1.0
    scale: float = 10.0
    bias: float = -10.0
    learn: bool = True


class SigmoidTerm(Term):
    """weight * the sum over captions, mean over images, of -log sigmoid(+-(t * score + b)), + for positive pairs."""

    choices: ClassVar[type[Strict]] = SigmoidOptions

    def __init__(self, options: SigmoidOptions) -> None:
        """Raises ValueError for a scale that is not above 0."""
        super().__init__(options)
        if options.scale <= 0:
            raise ValueError(f"loss term sigmoid: scale is {options.scale}; it must be above 0")
        self.weight = options.weight
        self.log_scale = nn.Parameter(torch.tensor(math.log(options.scale)), requires_grad=options.learn)
        self.bias = nn.Parameter(torch.tensor(options.bias), requires_grad=options.learn)

    def forward(self, scores: Tensor, positives: Tensor, step: int) -> Tensor:
        logits = self.log_scale.exp() * scores + self.bias
        return -self.weight * F.logsigmoid(torch.where(positives.bool(), logits, -logits)).sum() / len(scores)
