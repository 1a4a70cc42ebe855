"""UARDA, unified adaptive relevance distinguishable attention (Zhang et al., IEEE TMM 2023), reconstructed.

What is certain and what is not: docs/methods/uarda.md#what-is-known.

Only fragments more similar than a threshold t take part in the attention, and t is the least-cost boundary between the similarities of
matched and mismatched fragments, re-estimated while they move. No code was published; choices that no source confirms are options.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from itm.config import Strict
from itm.matchers.late.base import LateInteraction, gram, parts_of, raw_scores
from itm.matchers.late.tiles import can_tile, tiled_relevance
from itm.matchers.late.uarda_attention import MOST_GROWTH, Attention, tile_relevance
from itm.matchers.late.uarda_pruned import Pruning
from itm.matchers.late.uarda_threshold import (
    NaafState,
    RelevanceThreshold,
    ThresholdOptions,
    misclassification_cost,
    naaf_walk,
    relevance_threshold,
)
from itm.types import Encoded, Images

__all__ = ["UARDA", "SeparationOptions", "ThresholdOptions", "relevance_threshold"]


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


class UARDA(LateInteraction):
    """direction: t2i (words ask), i2t (regions ask), both (sum, one threshold each). eval_threshold: `t`, `t_safe` or a number.

    `threshold` holds ThresholdOptions, `separation` SeparationOptions. After `score` in training a method calls `auxiliary_losses`, which
    moves the thresholds and gives the separating loss. Parts must be unit vectors. `pruning` makes evaluation skip what t prunes.
    """

    kind: ClassVar[str] = "uarda"

    def __init__(
        self,
        *,
        vocab_size: int,
        image: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        direction: Literal["t2i", "i2t", "both"] = "t2i",
        lambda_softmax: float = 20.0,
        weights: Literal["softmax", "expm1", "scan"] = "softmax",
        eval_threshold: Literal["t", "t_safe"] | float = "t_safe",
        threshold: dict[str, Any] | None = None,
        separation: dict[str, Any] | None = None,
    ) -> None:
        """Raises ValueError for an unknown choice."""
        super().__init__(vocab_size=vocab_size, image=image, text=text)
        if direction not in ("t2i", "i2t", "both") or weights not in ("softmax", "expm1", "scan"):
            raise ValueError(f"UARDA: direction is t2i, i2t or both and weights softmax, expm1 or scan, not {direction!r} and {weights!r}")
        if isinstance(eval_threshold, str) and eval_threshold not in ("t", "t_safe"):
            raise ValueError(f"UARDA: eval_threshold is t, t_safe or a number, not {eval_threshold!r}")
        rule, self.separation = _read(ThresholdOptions, threshold), _read(SeparationOptions, separation)
        if rule.mode == "naaf_compat" and direction != "t2i":
            raise ValueError("UARDA: threshold.mode=naaf_compat knows direction=t2i only")
        self.attention = Attention(weights, lambda_softmax)
        self.eval_threshold = eval_threshold
        self.thresholds = nn.ModuleDict({d: RelevanceThreshold(rule) for d in (("t2i", "i2t") if direction == "both" else (direction,))})
        self.rule: ThresholdOptions = rule
        self._observed: dict[str, Observed] = {}
        self._encoded_rows = 0
        self.pruning: Pruning | None = None
        self.options = {
            **self.towers,
            "direction": direction,
            "lambda_softmax": lambda_softmax,
            "weights": weights,
            "eval_threshold": eval_threshold,
            "threshold": rule.model_dump(),
            "separation": self.separation.model_dump(),
        }

    def encode_images(self, images: Images) -> Encoded:
        self._encoded_rows = len(images)
        return super().encode_images(images)

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T): mean of r over all valid query items, pruned ones included; `both` adds the two directions."""
        total: Tensor | float = 0.0
        for direction in self.thresholds:
            query, context = (captions, images) if direction == "t2i" else (images, captions)
            scores = self._directed(direction, query, context)
            total = total + (scores if direction == "t2i" else scores.T)
        assert isinstance(total, Tensor)
        return total

    def _directed(self, direction: str, query: Encoded, context: Encoded) -> Tensor:
        if self._prunes():
            assert self.pruning is not None
            return self.pruning.scores(direction, query, context, self.attention, self._threshold(direction))
        if self.cuts_tiles(query if direction == "t2i" else context):
            return self._tiled(direction, query, context)
        (queries, query_mask), (items, context_mask) = parts_of(query), parts_of(context)
        raw, grams = raw_scores(queries, items), gram(items)
        observing = self.training and torch.is_grad_enabled()
        maxima = raw.masked_fill(~context_mask[:, None, None, :], -torch.inf).amax(-1) if observing else None
        if observing and self.rule.mode == "naaf_compat":
            assert maxima is not None
            scores = self._walk(direction, raw, grams, maxima.detach(), query_mask, context_mask)
        else:
            relevance = self.attention.relevance(raw, grams, context_mask, self._threshold(direction))
            scores = (relevance * query_mask).sum(-1) / query_mask.sum(-1)
        if maxima is not None:
            self._observed[direction] = Observed(maxima, query_mask, scores.detach())
        return scores

    def cuts_tiles(self, captions: Encoded) -> bool:
        """Whether `score` cuts its own tiles and builds nothing as large as all pairs: in evaluation without gradient or pruning."""
        if self.training or self._prunes() or self.attention.weights != "softmax" or not can_tile(captions):
            return False
        return all(self.attention.lambda_softmax * (1 - float(self._threshold(d))) < MOST_GROWTH for d in self.thresholds)

    def _prunes(self) -> bool:
        return self.pruning is not None and not self.training and not torch.is_grad_enabled()

    def _tiled(self, direction: str, query: Encoded, context: Encoded) -> Tensor:
        """(Nc,Nq), the same scores without gradient."""
        t2i, t = direction == "t2i", self._threshold(direction)
        images, captions = (context, query) if t2i else (query, context)
        scores = parts_of(context)[0].new_empty(len(context), len(query))
        attend = functools.partial(tile_relevance, t=float(t), smooth=self.attention.lambda_softmax)
        for rows, chosen, relevance, mask in tiled_relevance(images, captions, direction, attend):
            found = (relevance * mask).sum(-1) / mask.sum(-1)
            if t2i:
                scores[rows, chosen] = found
            else:
                scores[chosen, rows] = found
        return scores

    def _threshold(self, direction: str) -> Tensor | float:
        """t in training; `eval_threshold` in evaluation, frozen."""
        state: Any = self.thresholds[direction]
        if self.training or self.eval_threshold == "t":
            return state.t.clone()
        return state.t_safe if self.eval_threshold == "t_safe" else float(self.eval_threshold)

    def _walk(self, direction: str, raw: Tensor, grams: Tensor, maxima: Tensor, mask: Tensor, context_mask: Tensor) -> Tensor:
        """NAAF's order of events: each caption is scored with the threshold that the captions before it have left."""
        state: Any = self.thresholds[direction]
        columns: list[Tensor] = []

        def score(caption: int, t: float) -> Tensor:
            relevance = self.attention.relevance(raw[:, caption : caption + 1], grams, context_mask, t)[:, 0]
            columns.append(relevance[:, mask[caption]].mean(-1))
            return columns[-1].detach()

        walk = NaafState(float(state.t), float(state.t_safe))
        naaf_walk(maxima, mask, score, walk, self.rule.alpha)
        state.t.fill_(walk.t)
        state.t_safe.fill_(walk.t_safe)
        state.statistics.copy_(torch.tensor(walk.statistics))
        return torch.stack(columns, 1)

    def auxiliary_losses(self, positives: Tensor | None = None) -> dict[str, Tensor]:
        """Call once after `score` in training: moves the thresholds; {"separation": scalar} when it is on, else {}.

        positives (I,T) bool; unset = the diagonal. Scores gathered over ranks are recognised by their size and not summed again.
        """
        losses: list[Tensor] = []
        for direction, seen in self._observed.items():
            state: Any = self.thresholds[direction]
            own = torch.eye(*seen.scores.shape, dtype=torch.bool, device=seen.scores.device) if positives is None else positives
            own = own if direction == "t2i" or positives is None else own.T
            matched, mismatched = self._samples(seen, own, int(state.steps))
            if matched.numel() > 1:
                state.pruned.copy_(torch.stack([(x <= state.t).double().mean() for x in (matched.detach(), mismatched.detach())]))
            if self.separation.weight and matched.numel() > 1 and int(state.steps) >= self.rule.warmup_steps:
                losses.append(self.separation.weight * seen.scores.shape[1] * self._separate(matched, mismatched, state.t.clone()))
            if self.rule.mode == "batch":
                images = seen.scores.shape[0 if direction == "t2i" else 1]
                state.update(matched.detach(), mismatched.detach(), everywhere=images != self._encoded_rows)
        self._observed = {}
        return {"separation": torch.stack(losses).sum()} if losses else {}

    def _samples(self, seen: Observed, own: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Row maxima of queries whose best context is their own: on it, and on one wrong context. Both (n,).

        Step 2 of docs/methods/uarda.md#update-rule.
        """
        scores = seen.scores
        if self.rule.mismatch == "random":
            generator = torch.Generator().manual_seed(step)
            preference = torch.rand(scores.shape, generator=generator).to(scores.device)
        else:
            preference = -scores if self.rule.mismatch == "easiest" else scores
        wrong = preference.masked_fill(own, -torch.inf).argmax(0)
        queries = torch.arange(scores.shape[1], device=scores.device)
        best = scores.argmax(0)
        right = own[best, queries] & ~own.all(0)
        chosen = seen.mask & right[:, None]
        return seen.maxima[best, queries][chosen], seen.maxima[wrong, queries][chosen]

    def _separate(self, matched: Tensor, mismatched: Tensor, t: Tensor) -> Tensor:
        alpha, t = self.rule.alpha, t.to(matched.dtype)
        if self.separation.kind == "hinge":
            delta = self.separation.delta
            return (t + delta - matched).relu().mean() + alpha * (mismatched - t + delta).relu().mean()
        spread = [x.var().clamp(min=1e-8).sqrt() for x in (matched, mismatched)]
        return misclassification_cost(t, matched.mean(), spread[0], mismatched.mean(), spread[1], matched.new_tensor(alpha))


def _read(model: Any, options: dict[str, Any] | None) -> Any:
    try:
        return model(**(options or {}))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"UARDA {model.__name__}: {problems}; known: {', '.join(model.model_fields)}") from None
