"""The contrastive term: a softmax over the scores of a batch, with a temperature of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from itm.config import Strict
from itm.losses.contrastive import Reduction, contrastive_loss
from itm.methods.terms import Term, widened
from itm.types import Options


class ContrastiveOptions(Strict):
    """`tau` is learned unless learn_tau is false and clamped into tau_range at the start of every forward pass."""

    weight: float = 1.0
    tau: float = 0.05
    tau_range: tuple[float, float] | None = None
    learn_tau: bool = True
    reduction: Reduction = "mean"


class ContrastiveTerm(Term):
    """weight * contrastive_loss with a temperature of its own (docs/methods/dual.md#contrastive-loss)."""

    choices: ClassVar[type[Strict]] = ContrastiveOptions
    alone: ClassVar[Options] = {"reduction": "sum"}  # the usual InfoNCE

    def __init__(self, options: ContrastiveOptions) -> None:
        super().__init__(options)
        self.options = options
        self.range = widened(options.tau_range, (0.01, 0.1), options.tau)
        self.tau = nn.Parameter(torch.tensor(options.tau), requires_grad=options.learn_tau)

    @torch.no_grad()
    def clamp_(self) -> None:
        self.tau.clamp_(*self.range)

    def forward(self, scores: Tensor, positives: Tensor, step: int = 0) -> Tensor:
        return self.options.weight * contrastive_loss(scores, self.tau, positives, reduction=self.options.reduction)
