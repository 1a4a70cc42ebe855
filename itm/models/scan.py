"""SCAN, stacked cross attention (Lee et al., ECCV 2018), as in the authors' code: every direction, norm and aggregation, batched.

Cosines with attended vectors come from the raw scores and the Gram matrix of the context, so no attended vector is built; the numbers
are the authors' up to rounding. One image and one word work, and so do the two l1 norms, all of which fail in the original.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.models.attention import EPS, LateInteraction, attended_norm, gram, guarded_norm, l1, l2, parts_of, raw_scores, zero_padding
from itm.types import Encoded

Direction = Literal["t2i", "i2t"]
RawNorm = Literal["clipped_l2norm", "l2norm", "clipped", "no_norm", "softmax", "clipped_l1norm", "l1norm"]
Aggregation = Literal["LogSumExp", "Mean", "Max", "Sum"]


class SCAN(LateInteraction):
    """The options beside `image` and `text` (see LateInteraction) have the authors' names and meanings."""

    kind: ClassVar[str] = "scan"

    def __init__(
        self,
        *,
        vocab_size: int,
        image: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        cross_attn: Direction = "t2i",
        raw_feature_norm: RawNorm = "clipped_l2norm",
        agg_func: Aggregation = "LogSumExp",
        lambda_softmax: float = 9.0,
        lambda_lse: float = 6.0,
    ) -> None:
        """Raises ValueError for an unknown choice."""
        super().__init__(vocab_size=vocab_size, image=image, text=text)
        chosen = {"cross_attn": cross_attn, "raw_feature_norm": raw_feature_norm, "agg_func": agg_func}
        for (name, choice), known in zip(chosen.items(), (Direction, RawNorm, Aggregation), strict=True):
            if choice not in get_args(known):
                raise ValueError(f"SCAN has no {name}={choice!r}; known: {', '.join(get_args(known))}")
        self.cross_attn, self.raw_feature_norm, self.agg_func = cross_attn, raw_feature_norm, agg_func
        self.lambda_softmax, self.lambda_lse = lambda_softmax, lambda_lse
        self.options = {**self.towers, **chosen, "lambda_softmax": lambda_softmax, "lambda_lse": lambda_lse}

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T). t2i: words attend to regions, aggregated over words; i2t: regions attend to words, aggregated over regions (spec 3)."""
        query, context = (captions, images) if self.cross_attn == "t2i" else (images, captions)
        scores = aggregate(self._relevance(query, context), parts_of(query)[1], self.agg_func, self.lambda_lse)
        return scores if self.cross_attn == "t2i" else scores.T

    def _relevance(self, query: Encoded, context: Encoded) -> Tensor:
        """r (Nc,Nq,Q): cosine of each query item with the context as it attends to it (spec 2 and 3)."""
        (queries, query_mask), (items, context_mask) = parts_of(query), parts_of(context)
        queries = zero_padding(queries, query_mask)
        raw = raw_scores(queries, items)
        attention = normalise_raw(raw, self.raw_feature_norm, query_mask)
        logits = (self.lambda_softmax * attention).masked_fill(~context_mask[:, None, None, :], -torch.inf)
        weights = logits.softmax(-1)
        norms = guarded_norm(queries).squeeze(-1) * attended_norm(weights, gram(items))
        return (weights * raw).sum(-1) / norms.clamp(min=EPS)


def normalise_raw(raw: Tensor, kind: RawNorm, query_mask: Tensor) -> Tensor:
    """The raw norm over the query axis, per context item (spec 2, step 2). raw (Nc,Nq,Q,C) with zero rows at padded queries."""
    if kind.startswith("clipped"):
        raw = F.leaky_relu(raw, 0.1)
    if kind.endswith("l2norm"):
        return l2(raw, dim=2)
    if kind.endswith("l1norm"):
        return l1(raw, dim=2)
    if kind == "softmax":
        return raw.masked_fill(~query_mask[None, :, :, None], -torch.inf).softmax(2)
    return raw


def aggregate(relevance: Tensor, query_mask: Tensor, kind: Aggregation, lambda_lse: float) -> Tensor:
    """(Nc,Nq,Q) -> (Nc,Nq) over the real query items. LogSumExp = log(sum exp(lambda r)) / lambda (spec 3)."""
    padded = ~query_mask[None]
    if kind == "LogSumExp":
        return (lambda_lse * relevance).masked_fill(padded, -math.inf).logsumexp(-1) / lambda_lse
    if kind == "Max":
        return relevance.masked_fill(padded, -math.inf).amax(-1)
    total = relevance.masked_fill(padded, 0.0).sum(-1)
    return total / query_mask.sum(-1) if kind == "Mean" else total
