"""Hard negatives for IAIS: which rows of a pool or of a batch stand beside the positive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
