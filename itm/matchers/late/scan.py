"""SCAN, stacked cross attention (Lee et al., ECCV 2018), as in the authors' code: every direction, norm and aggregation, batched.

Cosines with attended vectors come from the raw scores and the Gram matrix of the context, so no attended vector is built; the numbers
are the authors' up to rounding. One image and one word work, and so do the two l1 norms, all of which fail in the original.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar, Literal, Unpack, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.kinds import refuse_unknown
from itm.matchers.late.base import LateInteraction, Towers, attended_norm, gram, parts_of, raw_scores, zero_padding
from itm.matchers.late.pairs import PairRows, split_by
from itm.matchers.late.tiles import attended_squares, can_tile, form_of, tiled_relevance
from itm.matchers.norms import EPS, guarded_norm, l1, l2
from itm.types import Encoded, SplitScore

Direction = Literal["t2i", "i2t"]
RawNorm = Literal["clipped_l2norm", "l2norm", "clipped", "no_norm", "softmax", "clipped_l1norm", "l1norm"]
Aggregation = Literal["LogSumExp", "Mean", "Max", "Sum"]
MOST_SMOOTHING = 64  # exp(64)^2 x regions is still a float32


def attend(raw: Tensor, grams: Tensor, context_mask: Tensor | None, clipped: bool, smooth: float) -> Tensor:
    """(3,Nc,Q,Nq): w'raw, w'Gw and sum w for weights w that the softmax would divide by their sum; in (-1,1) x smooth, exp is safe.

    raw (Nc,C,Q,Nq), grams (Nc,C,C), context_mask (Nc,C): a tile of `itm.matchers.late.tiles`.
    """
    weights = F.leaky_relu(raw, 0.1) if clipped else raw.clone()
    norms = weights.square().sum(2, keepdim=True).sqrt_()
    weights.mul_(smooth / norms.add_(EPS)).exp_()
    if context_mask is not None:
        weights.mul_(context_mask[:, :, None, None])
    squares, total = attended_squares(weights, grams), weights.sum(1)
    return torch.stack([weights.mul_(raw).sum(1), squares, total])


class SCANOptions(Towers, total=False):
    """Beside the towers: names and meanings of the authors."""

    cross_attn: Direction
    raw_feature_norm: RawNorm
    agg_func: Aggregation
    lambda_softmax: float
    lambda_lse: float


DEFAULTS: SCANOptions = {
    "cross_attn": "t2i",
    "raw_feature_norm": "clipped_l2norm",
    "agg_func": "LogSumExp",
    "lambda_softmax": 9.0,
    "lambda_lse": 6.0,
}
CHOICES = {"cross_attn": Direction, "raw_feature_norm": RawNorm, "agg_func": Aggregation}


class SCAN(LateInteraction):
    """See `SCANOptions`, and LateInteraction for `image` and `text`."""

    kind: ClassVar[str] = "scan"

    def __init__(self, *, vocab_size: int, **options: Unpack[SCANOptions]) -> None:
        """Raises ValueError for an unknown option or choice."""
        refuse_unknown(options, SCANOptions.__annotations__, "SCAN")
        o: SCANOptions = {**DEFAULTS, **options}
        super().__init__(vocab_size=vocab_size, image=o.get("image"), text=o.get("text"))
        self.options = {**self.towers, **o, **self.towers}
        for name, known in CHOICES.items():
            if self.options[name] not in get_args(known):
                raise ValueError(f"SCAN has no {name}={self.options[name]!r}; known: {', '.join(get_args(known))}")
        self.cross_attn, self.raw_feature_norm, self.agg_func = o["cross_attn"], o["raw_feature_norm"], o["agg_func"]
        self.lambda_softmax, self.lambda_lse = o["lambda_softmax"], o["lambda_lse"]

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T). t2i: words attend to regions, aggregated over words; i2t: regions attend to words, aggregated over regions.

        Equations: docs/methods/scan.md#score.
        """
        if self.cuts_tiles(captions):
            return self._tiled(images, captions)
        query, context = (captions, images) if self.cross_attn == "t2i" else (images, captions)
        scores = aggregate(self._relevance(query, context), parts_of(query)[1], self.agg_func, self.lambda_lse)
        return scores if self.cross_attn == "t2i" else scores.T

    def cuts_tiles(self, captions: Encoded) -> bool:
        """Whether `score` cuts its own tiles and builds nothing as large as all pairs: without gradient, for the norms that allow it."""
        normed = self.raw_feature_norm in ("clipped_l2norm", "l2norm") and abs(self.lambda_softmax) < MOST_SMOOTHING
        return normed and can_tile(captions)

    def _tiled(self, images: Encoded, captions: Encoded) -> Tensor:
        """The same scores without gradient."""
        t2i, parts = self.cross_attn == "t2i", parts_of(images)[0]
        scores = parts.new_empty(len(images), len(captions))
        norms = guarded_norm(parts_of(captions if t2i else images)[0]).squeeze(-1)
        weigh = functools.partial(
            form_of(attend, self.fuse_tiles), clipped=self.raw_feature_norm.startswith("clipped"), smooth=self.lambda_softmax
        )
        for rows, chosen, (dots, squares, total), mask in tiled_relevance(images, captions, self.cross_attn, weigh):
            length = norms[chosen, : mask.shape[1]] if t2i else norms[rows]
            relevance = dots / torch.maximum(length * squares.sqrt(), EPS * total)
            found = aggregate(relevance, mask, self.agg_func, self.lambda_lse)
            scores[rows, chosen] = found if t2i else found.T
        return scores

    def split_score(self, images: Encoded, captions: Encoded) -> SplitScore | None:
        with torch.no_grad():
            if not self.cuts_tiles(captions):
                return None
            scores = self._tiled(images, captions)
        grams = gram(parts_of(images if self.cross_attn == "t2i" else captions)[0])
        return split_by(scores, functools.partial(self._pair_scores, grams), images, captions, self.recompute)

    def _pair_scores(self, grams: Tensor, pairs: PairRows) -> Tensor:
        """(n,). grams (N,C,C) of all contexts."""
        if self.cross_attn == "t2i":
            raw, queries, query_mask, context_mask, context = pairs.raw, pairs.words, pairs.word_mask, pairs.region_mask, pairs.image
        else:
            raw, queries, query_mask, context_mask, context = pairs.raw.mT, pairs.regions, pairs.region_mask, pairs.word_mask, pairs.caption
        most = context_mask.shape[1]
        grams, query_mask = grams[:, :most, :most].index_select(0, context), query_mask.unsqueeze(1)
        relevance = cosines_of(raw, self._weigh(raw, query_mask, context_mask), guarded_norm(queries).mT, grams)
        return aggregate(relevance, query_mask, self.agg_func, self.lambda_lse).squeeze(1)

    def _relevance(self, query: Encoded, context: Encoded) -> Tensor:
        """r (Nc,Nq,Q): cosine of each query item with the context as it attends to it (docs/methods/scan.md#attention)."""
        raw, weights = self._attend(query, context)
        return cosines_of(raw, weights, guarded_norm(zero_padding(*parts_of(query))).squeeze(-1), gram(parts_of(context)[0]))

    def _attend(self, query: Encoded, context: Encoded) -> tuple[Tensor, Tensor]:
        """Raw scores and attention weights, each (Nc,Nq,Q,C)."""
        (queries, query_mask), (items, context_mask) = parts_of(query), parts_of(context)
        raw = raw_scores(zero_padding(queries, query_mask), items)
        return raw, self._weigh(raw, query_mask, context_mask)

    def _weigh(self, raw: Tensor, query_mask: Tensor, context_mask: Tensor) -> Tensor:
        attention = normalise_raw(raw, self.raw_feature_norm, query_mask)
        logits = (self.lambda_softmax * attention).masked_fill(~context_mask[:, None, None, :], -torch.inf)
        return logits.softmax(-1)

    def weights(self, image: Encoded, caption: Encoded) -> Tensor:
        if self.cross_attn == "t2i":
            return self._attend(caption, image)[1][0]
        return self._attend(image, caption)[1][0].mT

    @property
    def relation_smoothing(self) -> float:
        return float(self.lambda_softmax)


def cosines_of(raw: Tensor, weights: Tensor, norms: Tensor, grams: Tensor) -> Tensor:
    """(Nc,Nq,Q) of raw scores and weights (Nc,Nq,Q,C), norms of the queries (Nq,Q) or (Nc,1,Q), and grams (Nc,C,C)."""
    return (weights * raw).sum(-1) / (norms * attended_norm(weights, grams)).clamp(min=EPS)


def normalise_raw(raw: Tensor, kind: RawNorm, query_mask: Tensor) -> Tensor:
    """The raw norm over the query axis, per context item. raw (Nc,Nq,Q,C) with zero rows at padded queries; mask (Nq,Q) or (Nc,1,Q).

    Table: docs/methods/scan.md#attention.
    """
    if kind.startswith("clipped"):
        raw = F.leaky_relu(raw, 0.1)
    if kind.endswith("l2norm"):
        return l2(raw, dim=2)
    if kind.endswith("l1norm"):
        return l1(raw, dim=2)
    if kind == "softmax":
        return raw.masked_fill(~query_mask[..., None], -torch.inf).softmax(2)
    return raw


def aggregate(relevance: Tensor, query_mask: Tensor, kind: Aggregation, lambda_lse: float) -> Tensor:
    """(Nc,Nq,Q) -> (Nc,Nq) over the real query items, mask (Nq,Q) or (Nc,1,Q). LogSumExp = log(sum exp(lambda r)) / lambda.

    Table: docs/methods/scan.md#score.
    """
    padded = ~query_mask
    if kind == "LogSumExp":
        return (lambda_lse * relevance).masked_fill(padded, -math.inf).logsumexp(-1) / lambda_lse
    if kind == "Max":
        return relevance.masked_fill(padded, -math.inf).amax(-1)
    total = relevance.masked_fill(padded, 0.0).sum(-1)
    return total / query_mask.sum(-1) if kind == "Mean" else total
