"""Hard negatives for IAIS: which rows of a pool or of a batch stand beside the positive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from itm.types import Captions, Images


@contextmanager
def mining_mode(matcher: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient; the training mode of before is restored."""
    training = matcher.training
    matcher.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        matcher.train(training)


def hardest_of_pool(matcher: Any, images: Images, captions: Captions, keep: int) -> Tensor:
    """Rows of a pool to train on, (1+keep,) int64: row 0 (the positive), then the negatives with the highest raw scores.

    One side has one row, the other is the pool with the positive first. Raises ValueError for any other shape.
    """
    if len(images) != 1 and len(captions) != 1:
        raise ValueError(f"a pool is one caption with many images or one image with many captions, not {len(images)} x {len(captions)}")
    with mining_mode(matcher):
        scores = matcher.score(matcher.encode_images(images), matcher.encode_captions(captions)).flatten()
    negatives = scores[1:].topk(min(keep, len(scores) - 1)).indices + 1
    return torch.cat([negatives.new_zeros(1), negatives])


def hardest_in_batch(scores: Tensor, candidates: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """For each row the `keep` highest-scored candidates: columns (N,K) int64 and whether each is real (N,K) bool.

    scores (N,M); candidates (N,M) bool. K = min(keep, most candidates of any row); a row with fewer has False at its end.
    Raises ValueError when no row has a candidate.
    """
    most = int(candidates.sum(1).max())
    if most == 0:
        raise ValueError("all pairs of the batch share one image, so there is no negative: raise train.batch_size or shuffle")
    top = scores.masked_fill(~candidates, float("-inf")).topk(min(keep, most), dim=1)
    return top.indices, top.values > float("-inf")


def first_of_each(ids: Tensor) -> Tensor:
    """(N,) bool: the first row of every id, so that a repeated image is one candidate."""
    return ~(ids[:, None] == ids[None, :]).tril(-1).any(1)
