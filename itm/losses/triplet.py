"""The hinge triplet loss of VSE++, SCAN, SGRAF and UARDA: a sum over the batch, with the hardest or with all negatives."""

from __future__ import annotations

import torch
from torch import Tensor


def triplet_loss(
    scores: Tensor, positives: Tensor | None = None, *, margin: float = 0.2, hardest: bool = True, official: bool = False
) -> Tensor:
    """Scalar: sum over positive pairs (i,t) of [m + s(i,c) - s(i,t)]_+ over captions c and [m + s(j,t) - s(i,t)]_+ over images j.

    scores (I,T), images in rows. positives (I,T) bool, or (B,) image ids of a square batch whose row k belongs to caption k; unset: the
    diagonal. hardest=True takes the largest negative of each anchor (`max_violation`), False sums all. A sum, not a mean:
    docs/methods/scan.md#loss.
    No caption of the own image is a negative, unless official=True, which masks the diagonal only, as the authors' code does.
    In a square batch with a positive diagonal the anchors are the diagonal; else every positive pair is an anchor.
    Raises ValueError for shapes that do not fit, and for official=True with a batch that is not square.
    """
    positives = _pairs(scores, positives)
    square = scores.shape[0] == scores.shape[1]
    if official:
        if not square:
            raise ValueError(f"official=True needs as many images as captions, not {tuple(scores.shape)}")
        positives = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    if square and bool(positives.diagonal().all()):
        image = caption = torch.arange(len(scores), device=scores.device)
    else:
        image, caption = positives.nonzero(as_tuple=True)
    own = scores[image, caption].unsqueeze(1)
    to_captions = (margin + scores[image] - own).clamp(min=0).masked_fill(positives[image], 0.0)
    to_images = (margin + scores.T[caption] - own).clamp(min=0).masked_fill(positives.T[caption], 0.0)
    if hardest:
        return to_captions.amax(1).sum() + to_images.amax(1).sum()
    return to_captions.sum() + to_images.sum()


def _pairs(scores: Tensor, positives: Tensor | None) -> Tensor:
    if scores.dim() != 2:
        raise ValueError(f"scores must be (images, captions), not {tuple(scores.shape)}")
    if positives is None:
        return torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    if positives.dim() == 1:
        positives = positives[:, None] == positives[None, :]
    if positives.shape != scores.shape or positives.dtype != torch.bool:
        raise ValueError(f"positives must be bool {tuple(scores.shape)} or one image id a row, not {tuple(positives.shape)}")
    return positives
