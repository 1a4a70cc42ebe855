"""Image-text contrastive loss (ITC, InfoNCE) with several positives per row, as a function of a score matrix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Reduction = Literal["mean", "sum"]


def contrastive_loss(scores: Tensor, tau: Tensor | float, positives: Tensor | None = None, *, reduction: Reduction = "mean") -> Tensor:
    """Mean of the two directions of the cross entropy of softmax(scores / tau) (docs/methods/cusa.md#contrastive-term); scalar.

    scores (I,T), images in rows; tau > 0; positives (I,T) bool or 0/1, every row and column with at least one, default the diagonal.
    The target of a row is uniform over its positives. reduction `sum`: sum over columns, mean over rows (the usual InfoNCE); `mean`:
    divided once more by the number of columns, as CUSA ships it: 1/B of an InfoNCE, which decides the balance with CSA and USA
    (docs/methods/cusa.md#scale-of-the-contrastive-term). Raises ValueError for scores that are not square without positives.
    """
    if positives is None:
        if scores.shape[0] != scores.shape[1]:
            raise ValueError(f"scores {tuple(scores.shape)} are not square, so their diagonal is no truth: give positives")
        positives = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    positives = positives.to(scores.dtype)
    return (contrastive_rows(scores, tau, positives, reduction) + contrastive_rows(scores.T, tau, positives.T, reduction)) / 2


def contrastive_rows(scores: Tensor, tau: Tensor | float, positives: Tensor, reduction: Reduction) -> Tensor:
    """One direction: each row of `scores` picks its positives among the columns."""
    target = positives / positives.sum(1, keepdim=True)
    return soft_cross_entropy(scores / tau, target, reduction)


def soft_cross_entropy(logits: Tensor, target: Tensor, reduction: Reduction) -> Tensor:
    """-sum target * log softmax(logits), divided by the rows (`sum`) or by the entries (`mean`). Both (N,M); target rows sum to 1."""
    summed = -(target * F.log_softmax(logits, dim=1)).sum()
    return summed / (logits.numel() if reduction == "mean" else len(logits))
