"""Plain matching: one ranking loss on the scores of a batch, for any matcher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from itm.methods.encode import batch_positives, encode
from itm.methods.hardest_pairs import score_and_loss
from itm.methods.terms import build_term, matcher_terms
from itm.types import Batch, Matcher, Method


class Matching(Method):
    """`loss`: a term of `itm.methods.terms` by name (contrastive, triplet, ...); the other options are the term's own.

    gather: scores over the batches of all ranks, with the gradient of one process on the concatenated batch after DDP's mean.
    Differs from CUSA's ITC in one default: reduction `sum`, the usual InfoNCE.
    """

    def __init__(self, matcher: Matcher, *, loss: str = "contrastive", gather: bool = False, **options: Any) -> None:
        """Raises ValueError for an unknown loss or option."""
        super().__init__()
        self.matcher, self.loss, self.gather = matcher, loss, gather
        self.term = build_term(loss, options, f"method matching, {loss}", alone=True)

    def forward(self, batch: Batch, step: int = 0, chunk: int | None = None) -> dict[str, Tensor]:
        """{`loss`: scalar}, and what the matcher adds (see `Matcher.training_terms`)."""
        self.term.clamp_()
        encoded = encode(self.matcher, batch, self.gather, chunk)
        positives = batch_positives(batch, self.gather)
        scores, loss = score_and_loss(self.matcher, encoded, self.term, positives, step, self.hardest_pairs)
        return {self.loss: loss} | matcher_terms(self.matcher, scores, positives, batch)
