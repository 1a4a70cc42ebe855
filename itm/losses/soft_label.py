"""Soft-label alignment (CUSA's CSA and USA): student rows pulled towards the softmax of a teacher's similarities."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.losses.contrastive import Reduction, soft_cross_entropy

Divergence = Literal["kl", "contrastive"]
Mode = Literal["each", "add", "dot"]


def soft_label_loss(
    scores: Tensor,
    teacher: Tensor,
    tau: Tensor | float,
    teacher_tau: Tensor | float,
    *,
    loss: Divergence = "kl",
    reduction: Reduction = "mean",
) -> Tensor:
    """One direction of CSA or USA over the rows of `scores` (docs/methods/cusa.md#one-direction); scalar.

    Text-to-image: give the transpose.

    scores, teacher (N,M) similarities; target = softmax(teacher / teacher_tau), with gradient to a learnable teacher_tau.
    loss `kl`: KL(target || softmax(scores / tau)), sum over columns, mean over rows; `contrastive`: the soft cross entropy, with
    reduction `sum` likewise and `mean` divided once more by the columns.
    """
    log_target = F.log_softmax(teacher / teacher_tau, dim=1)
    target = log_target.exp()
    logits = scores / tau
    if loss == "contrastive":
        return soft_cross_entropy(logits, target, reduction)
    return (target * (log_target - F.log_softmax(logits, dim=1))).sum() / len(scores)


def cosine_matrix(vectors: Tensor) -> Tensor:
    """(N,N) cosines of the rows of (N,D), diagonal included (docs/methods/cusa.md#soft-labels); at least float32 whatever the autocast."""
    with torch.autocast(vectors.device.type, enabled=False):
        unit = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)
        return unit @ unit.T


def mixed_similarity(image: Tensor, text: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """The targets of (image-to-text, text-to-image) from two (B,B) teacher cosines (docs/methods/cusa.md#soft-label-terms).

    `each`: its own teacher for each direction; `add`: their mean for both; `dot`: the geometric mean of the non-negative parts.
    """
    if mode == "each":
        return image, text
    mixed = (image + text) / 2 if mode == "add" else (image.clamp(min=0) * text.clamp(min=0)).sqrt()
    return mixed, mixed
