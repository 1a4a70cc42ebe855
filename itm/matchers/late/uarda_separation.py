"""What UARDA learns its thresholds from: similarities of matched and of mismatched fragments of a training batch, and their separation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from itm.config import Strict
from itm.device import send
from itm.matchers.late.uarda_threshold import misclassification_cost

Mismatch = Literal["random", "easiest", "hardest"]


class SeparationOptions(Strict):
    """The separating loss (docs/methods/uarda.md#losses), weight x batch x loss: `cost` of the boundary or `hinge` around it.

    weight 0.02 to 0.05 when on.
    """

    weight: float = 0.0
    kind: Literal["cost", "hinge"] = "cost"
    delta: float = 0.05


@dataclass
class Observed:
    """What one direction saw in a training step: row maxima (Nc,Nq,Q) with gradient, their mask (Nq,Q), scores (Nc,Nq)."""

    maxima: Tensor
    mask: Tensor
    scores: Tensor


def samples(seen: Observed, own: Tensor, mismatch: Mismatch, step: int) -> tuple[Tensor, Tensor]:
    """Row maxima of queries whose best context is their own (Nc,Nq) bool: on it, and on one wrong context. Both (n,).

    Step 2 of docs/methods/uarda.md#update-rule. step: seed of the random choice.
    """
    scores = seen.scores
    if mismatch == "random":
        generator = torch.Generator().manual_seed(step)
        preference = send(torch.rand(scores.shape, generator=generator), scores.device)
    else:
        preference = -scores if mismatch == "easiest" else scores
    wrong = preference.masked_fill(own, -torch.inf).argmax(0)
    queries = torch.arange(scores.shape[1], device=scores.device)
    best = scores.argmax(0)
    right = own[best, queries] & ~own.all(0)
    chosen = (seen.mask & right[:, None]).nonzero(as_tuple=True)
    return seen.maxima[best, queries][chosen], seen.maxima[wrong, queries][chosen]


def separation_loss(matched: Tensor, mismatched: Tensor, t: Tensor, options: SeparationOptions, alpha: float) -> Tensor:
    """The loss itself, without weight and batch size; alpha: cost of an irrelevant fragment taken as relevant."""
    t = t.to(matched.dtype)
    if options.kind == "hinge":
        return (t + options.delta - matched).relu().mean() + alpha * (mismatched - t + options.delta).relu().mean()
    spread = [x.var().clamp(min=1e-8).sqrt() for x in (matched, mismatched)]
    return misclassification_cost(t, matched.mean(), spread[0], mismatched.mean(), spread[1], matched.new_tensor(alpha))
