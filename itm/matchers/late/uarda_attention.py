"""How UARDA's fragments attend to what is more similar than the threshold t, for training and for tiles without gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.matchers.late.base import parts_of
from itm.matchers.late.pairs import PairRows
from itm.matchers.late.tiles import attended_squares
from itm.matchers.norms import l2
from itm.types import Encoded

MOST_GROWTH = 40  # (exp(40) x regions)^2 is still a float32


def tile_relevance(raw: Tensor, grams: Tensor, context_mask: Tensor | None, t: float, smooth: float) -> Tensor:
    """r (Nc,Q,Nq) with softmax weights, of a tile of `itm.matchers.late.tiles`: raw (Nc,C,Q,Nq). smooth (1 - t) is below MOST_GROWTH."""
    if context_mask is not None:
        raw = raw.masked_fill(~context_mask[:, :, None, None], t)
    e = weights_above(raw, t, smooth)
    square = attended_squares(e, grams)
    return torch.where(square > 0, e.mul_(raw).sum(1) / square.sqrt(), 0.0)


def packed_tile_relevance(raw: Tensor, grams: Tensor, alive: Tensor, t: float, smooth: float) -> Tensor:
    """The same of the query items `alive` (Nc,Q,Nq), 0 for all others. raw (C,Nc,Q,Nq) is context first, so that an item is one column."""
    chosen = alive.flatten().nonzero().squeeze(1)
    columns = raw.flatten(1).index_select(1, chosen)
    e = weights_above(columns, t, smooth)
    counts = alive.flatten(1).sum(1).tolist()
    turned = torch.cat([own @ part for own, part in zip(grams.unbind(0), e.split(counts, 1), strict=True)], 1)
    square = turned.mul_(e).sum(0).clamp_(min=0)
    relevance = raw.new_zeros(alive.shape)
    relevance.view(-1)[chosen] = torch.where(square > 0, e.mul_(columns).sum(0) / square.sqrt(), 0.0)
    return relevance


def weights_above(raw: Tensor, t: float, smooth: float) -> Tensor:
    """exp(smooth (s - t)) where s > t, else 0: relative to the weight of exactly t, what passes weighs more than 1, so that no row maximum
    is needed and the weight itself is the mask."""
    return F.threshold((raw - t).mul_(smooth).exp_(), 1.0, 0.0, inplace=True)


def observed_relevance(raw: Tensor, grams: Tensor, context_mask: Tensor | None, t: float, smooth: float) -> Tensor:
    """(2,Nc,Q,Nq): `tile_relevance`, and the largest raw score of each query item."""
    top = (raw if context_mask is None else raw.masked_fill(~context_mask[:, :, None, None], -torch.inf)).amax(1)
    return torch.stack([tile_relevance(raw, grams, context_mask, t, smooth), top])


Tile = tuple[slice, Tensor, Tensor, Tensor]


def pooled_tiles(direction: str, query: Encoded, context: Encoded, tiles: Iterator[Tile], observed: bool) -> tuple[Tensor, Tensor | None]:
    """Scores (Nc,Nq) of tiles of relevance, and with `observed`, where they are of `observed_relevance`, row maxima (Nc,Nq,Q)."""
    query_mask, items = parts_of(query)[1], parts_of(context)[0]
    scores = items.new_empty(len(context), len(query))
    maxima = items.new_full((len(context), *query_mask.shape), -torch.inf) if observed else None
    for rows, chosen, related, mask in tiles:
        place: tuple[slice | Tensor, ...] = (rows, chosen) if direction == "t2i" else (chosen, rows)
        if maxima is not None:
            maxima[(*place, slice(mask.shape[1]))] = related[1]
        relevance = related if maxima is None else related[0]
        scores[place] = (relevance * mask).sum(-1) / mask.sum(-1)
    return scores, maxima


@dataclass
class Attention:
    """How a query attends to its context above t. weights: softmax | expm1 (continuous in t) | scan (l2 over queries, lambda 9)."""

    weights: str
    lambda_softmax: float

    def relevance(self, raw: Tensor, grams: Tensor, context_mask: Tensor, t: Tensor | float) -> Tensor:
        """r (Nc,Nq,Q) = (sum_c e_c s_c) / sqrt(e' G e), 0 where nothing passes t. raw (Nc,Nq,Q,C), grams (Nc,C,C).

        Equation: docs/methods/uarda.md#attention.
        """
        e = self.unnormalised(raw, context_mask, t)
        flat = e.flatten(1, 2)
        with torch.autocast(raw.device.type, enabled=False):
            square = (flat @ grams * flat).sum(-1).view(raw.shape[:3])
        alive = square > 1e-16
        return torch.where(alive, (e * raw).sum(-1) / torch.where(alive, square, 1.0).sqrt(), 0.0)

    def shares(self, raw: Tensor, context_mask: Tensor, t: Tensor | float) -> Tensor:
        """(Nc,Nq,Q,C) the weights such that a row sums to 1, or to 0 where nothing passes t."""
        e = self.unnormalised(raw, context_mask, t)
        return e / e.sum(-1, keepdim=True).clamp(min=torch.finfo(e.dtype).tiny)

    def unnormalised(self, raw: Tensor, context_mask: Tensor, t: Tensor | float) -> Tensor:
        """e (Nc,Nq,Q,C) >= 0: weights up to a factor a row, 0 for s <= t. The row maximum is taken out, so that e <= 1."""
        keep = (raw > t) & context_mask[:, None, None, :]
        if self.weights == "scan":
            above = l2((raw - t).relu() * keep, dim=2)
            return torch.exp(9.0 * (above - 1.0)) * keep
        top = raw.masked_fill(~keep, -torch.inf).amax(-1, keepdim=True).detach()
        top = torch.where(top > -torch.inf, top, 0.0)
        e = torch.exp(self.lambda_softmax * (raw - top).clamp(max=0.0))
        if self.weights == "expm1":
            e = e - torch.exp(self.lambda_softmax * (t - top).clamp(max=0.0))
        return e * keep


def chosen_scores(attend: Attention, known: dict[str, tuple[Tensor, Tensor | float]], pairs: PairRows) -> Tensor:
    """(n,). known {direction: (grams (N,C,C) of all contexts, threshold of this step)}."""
    found = []
    for direction, (grams, t) in known.items():
        if direction == "t2i":
            raw, mask, context_mask, context = pairs.raw, pairs.word_mask, pairs.region_mask, pairs.image
        else:
            raw, mask, context_mask, context = pairs.raw.mT, pairs.region_mask, pairs.word_mask, pairs.caption
        most = context_mask.shape[1]
        relevance = attend.relevance(raw, grams[:, :most, :most].index_select(0, context), context_mask, t).squeeze(1)
        found.append((relevance * mask).sum(-1) / mask.sum(-1))
    return torch.stack(found).sum(0)
