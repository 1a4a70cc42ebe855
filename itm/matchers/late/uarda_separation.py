"""What UARDA learns its thresholds from: similarities of matched and of mismatched fragments of a training batch, and their separation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from itm.config import Strict
from itm.device import send
from itm.matchers.late.uarda_threshold import RelevanceThreshold, misclassification_cost

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


def followed_threshold(state: RelevanceThreshold, seen: Observed, mismatch: Mismatch) -> Tensor:
    """`RelevanceThreshold.followed` by the samples of a batch whose pairs stand on the diagonal of its scores.

    Raises ValueError for scores that are not square.
    """
    contexts, queries = seen.scores.shape
    if contexts != queries:
        raise ValueError(f"threshold_grad=implicit takes the pairs from the diagonal of the scores, which are {contexts} x {queries} here")
    own = torch.eye(queries, dtype=torch.bool, device=seen.scores.device)
    matched, mismatched = samples(seen, own, mismatch, int(state.steps))
    return state.followed(matched, mismatched) if matched.numel() > 1 else state.t.clone()


def separation_loss(matched: Tensor, mismatched: Tensor, t: Tensor, options: SeparationOptions, alpha: float) -> Tensor:
    """The loss itself, without weight and batch size; alpha: cost of an irrelevant fragment taken as relevant."""
    t = t.to(matched.dtype)
    if options.kind == "hinge":
        return (t + options.delta - matched).relu().mean() + alpha * (mismatched - t + options.delta).relu().mean()
    spread = [x.var().clamp(min=1e-8).sqrt() for x in (matched, mismatched)]
    return misclassification_cost(t, matched.mean(), spread[0], mismatched.mean(), spread[1], matched.new_tensor(alpha))
