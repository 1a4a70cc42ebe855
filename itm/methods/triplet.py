"""The triplet term: hinges on the hardest or on all negatives of a batch, and a watch for collapse."""

from __future__ import annotations

import warnings
from typing import ClassVar, Literal

import torch
from torch import Tensor

from itm.config import Strict
from itm.losses.triplet import triplet_loss
from itm.methods.terms import Term

FLAT_STEPS = 50


class TripletOptions(Strict):
    """The first `warmup_steps` steps use all negatives instead of the hardest one. `official`: see `triplet_loss`.

    reduction `mean`: over the anchors of the batch. CUSA's soft labels are means, and beside a sum they weigh next to nothing.
    """

    weight: float = 1.0
    margin: float = 0.2
    hardest: bool = True
    warmup_steps: int = 0
    official: bool = False
    reduction: Literal["sum", "mean"] = "sum"


class TripletTerm(Term):
    """weight * triplet_loss, and a warning when the model has collapsed."""

    choices: ClassVar[type[Strict]] = TripletOptions
    flat_steps: Tensor

    def __init__(self, options: TripletOptions) -> None:
        super().__init__(options)
        self.options = options
        self.register_buffer("flat_steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.reported = False

    def reaches_few_pairs(self, step: int) -> bool:
        return self.options.hardest and step >= self.options.warmup_steps

    def forward(self, scores: Tensor, positives: Tensor, step: int = 0) -> Tensor:
        o = self.options
        self._watch(scores.detach(), step)
        loss = triplet_loss(scores, positives, margin=o.margin, hardest=self.reaches_few_pairs(step), official=o.official)
        return o.weight * (loss if o.reduction == "sum" else loss / len(scores))

    def _watch(self, scores: Tensor, step: int) -> None:
        """Scores that differ only by image, only by caption, or not at all hold the hardest-negative loss at the margin for every query.

        The device is asked only now and then; the warning comes once.
        """
        spread = torch.minimum(*((scores.amax(side) - scores.amin(side)).amax() for side in (0, 1)))
        self.flat_steps = torch.where(spread < self.options.margin / 10, self.flat_steps + 1, 0)
        if not self.reported and step % FLAT_STEPS == FLAT_STEPS - 1 and int(self.flat_steps) >= FLAT_STEPS:
            self.reported = True
            warnings.warn(
                f"all scores of an image or a caption have been equal for {FLAT_STEPS} steps: the triplet loss is stuck at the margin (2 x "
                f"{self.options.margin} a pair). Start again with warmup_steps (all negatives first) or a smaller train.lr."
            )
