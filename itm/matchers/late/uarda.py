"""UARDA, unified adaptive relevance distinguishable attention (Zhang et al., IEEE TMM 2023), reconstructed.

What is certain and what is not: docs/methods/uarda.md#what-is-known.

Only fragments more similar than a threshold t take part in the attention, and t is the least-cost boundary between the similarities of
matched and mismatched fragments, re-estimated while they move. No code was published; choices that no source confirms are options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ClassVar, Literal, TypedDict, TypeVar, Unpack

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from itm.config import Strict
from itm.kinds import refuse_unknown
from itm.matchers.late.base import LateInteraction, Towers, gram, parts_of, raw_scores
from itm.matchers.late.naaf import walked_scores
from itm.matchers.late.pairs import split_by
from itm.matchers.late.tiles import can_tile, form_of, tiled_relevance
from itm.matchers.late.uarda_attention import MOST_GROWTH, Attention, chosen_scores, observed_relevance, pooled_tiles, tile_relevance
from itm.matchers.late.uarda_pruned import Pruning
from itm.matchers.late.uarda_separation import Observed, SeparationOptions, followed_threshold, samples, separation_loss
from itm.matchers.late.uarda_threshold import RelevanceThreshold, ThresholdOptions, relevance_threshold
from itm.types import Encoded, Options, SplitScore

__all__ = ["UARDA", "SeparationOptions", "ThresholdOptions", "relevance_threshold"]

Model = TypeVar("Model", bound=Strict)


class Choices(TypedDict, total=False):
    """direction: t2i (words ask), i2t (regions ask), both (sum, one threshold each). eval_threshold: `t`, `t_safe` or a number.

    threshold_grad: constant, or implicit (needs expm1 weights): the ranking loss moves the distributions by way of t as well.
    `threshold` holds ThresholdOptions, `separation` SeparationOptions.
    """

    direction: Literal["t2i", "i2t", "both"]
    lambda_softmax: float
    weights: Literal["softmax", "expm1", "scan"]
    eval_threshold: Literal["t", "t_safe"] | float
    threshold_grad: Literal["constant", "implicit"]
    threshold: Options | None
    separation: Options | None


class UARDAOptions(Choices, Towers, total=False):
    """The choices of UARDA, and its towers."""


DEFAULTS: Choices = {
    "direction": "t2i",
    "lambda_softmax": 20.0,
    "weights": "softmax",
    "eval_threshold": "t_safe",
    "threshold_grad": "constant",
    "threshold": None,
    "separation": None,
}


class UARDA(LateInteraction):
    """See `UARDAOptions`. Parts must be unit vectors. `training_terms` moves the thresholds and gives the separating loss; it reads what
    `score` saw in training. `pruning` makes evaluation skip what t prunes.
    """

    kind: ClassVar[str] = "uarda"
    prunes: ClassVar[bool] = True

    def __init__(self, *, vocab_size: int, **options: Unpack[UARDAOptions]) -> None:
        """Raises ValueError for an unknown option or choice."""
        refuse_unknown(options, UARDAOptions.__annotations__, "UARDA")
        o: UARDAOptions = {**DEFAULTS, **options}
        super().__init__(vocab_size=vocab_size, image=o.get("image"), text=o.get("text"))
        self.rule, self.separation = _read(ThresholdOptions, o["threshold"]), _read(SeparationOptions, o["separation"])
        _check(o, self.rule)
        direction, self.eval_threshold, self.implicit = o["direction"], o["eval_threshold"], o["threshold_grad"] == "implicit"
        self.attend = Attention(o["weights"], o["lambda_softmax"])
        directions = ("t2i", "i2t") if direction == "both" else (direction,)
        self.thresholds = nn.ModuleDict({d: RelevanceThreshold(self.rule) for d in directions})
        self.observed: dict[str, Observed] = {}
        self.pruning: Pruning | None = None
        read = {"threshold": self.rule.model_dump(), "separation": self.separation.model_dump()}
        self.options = {**self.towers, **_recorded(o), **self.towers, **read}

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T): mean of r over all valid query items, pruned ones included; `both` adds the two directions."""
        return _sum(self.thresholds, images, captions, self._directed)

    def split_score(self, images: Encoded, captions: Encoded) -> SplitScore | None:
        with torch.no_grad():  # none where thresholds move within the batch or have a gradient, or maxima of all pairs have one
            if self.rule.mode != "batch" or self.separation.weight or self.implicit or not self._can_tile(captions):
                return None
            scores = _sum(self.thresholds, images, captions, functools.partial(self._tiled, observe=self.training))
        known = {d: (gram(parts_of(images if d == "t2i" else captions)[0]), self._threshold(d)) for d in self.thresholds}
        return split_by(scores, functools.partial(chosen_scores, self.attend, known), images, captions, self.recompute)

    def _directed(self, direction: str, query: Encoded, context: Encoded) -> Tensor:
        t = self._threshold(direction)
        if self.cuts_tiles(query if direction == "t2i" else context):
            return self._tiled(direction, query, context)
        if self.pruning is not None and self._prunes():
            return self.pruning.scores(direction, query, context, self.attend, t)
        (queries, query_mask), (items, context_mask) = parts_of(query), parts_of(context)
        raw, grams = raw_scores(queries, items), gram(items)
        observing, masks = self.training and torch.is_grad_enabled(), (query_mask, context_mask)
        if not observing:
            return self._pooled(raw, grams, masks, t)
        maxima = raw.masked_fill(~context_mask[:, None, None, :], -torch.inf).amax(-1)
        if self.implicit:
            with torch.no_grad():
                first = self._pooled(raw, grams, masks, t)
            t = followed_threshold(self._state(direction), Observed(maxima, query_mask, first), self.rule.mismatch)
        walk = (self.attend, self._state(direction), self.rule.alpha, raw, grams, masks)
        scores = walked_scores(*walk) if self.rule.mode == "naaf_compat" else self._pooled(raw, grams, masks, t)
        self.observed[direction] = Observed(maxima, query_mask, scores.detach())
        return scores

    def _pooled(self, raw: Tensor, grams: Tensor, masks: tuple[Tensor, Tensor], t: Tensor | float) -> Tensor:
        """(Nc,Nq): mean of r over the valid query items."""
        query_mask, context_mask = masks
        relevance = self.attend.relevance(raw, grams, context_mask, t)
        return (relevance * query_mask).sum(-1) / query_mask.sum(-1)

    def cuts_tiles(self, captions: Encoded) -> bool:
        """Whether `score` cuts its own tiles and builds nothing as large as all pairs: in evaluation without gradient."""
        return not self.training and self._can_tile(captions)

    def _can_tile(self, captions: Encoded) -> bool:
        if self.attend.weights != "softmax" or not can_tile(captions):
            return False
        return all(self.attend.lambda_softmax * (1 - float(self._threshold(d))) < MOST_GROWTH for d in self.thresholds)

    def _prunes(self) -> bool:
        return self.pruning is not None and not self.training and not torch.is_grad_enabled()

    def _tiled(self, direction: str, query: Encoded, context: Encoded, observe: bool = False) -> Tensor:
        """(Nc,Nq), the same scores without gradient. observe: keep for `training_terms` what they are made of."""
        t2i, t = direction == "t2i", self._threshold(direction)
        images, captions = (context, query) if t2i else (query, context)
        form = form_of(observed_relevance if observe else tile_relevance, self.fuse_tiles)
        attend = functools.partial(form, t=float(t), smooth=self.attend.lambda_softmax)
        tiles = tiled_relevance(images, captions, direction, attend)
        if self.pruning is not None and not observe and self.pruning.engines.get(direction) != "all":
            tiles = self.pruning.tiles(images, captions, direction, float(t), self.attend.lambda_softmax)
        scores, maxima = pooled_tiles(direction, query, context, tiles, observe)
        if maxima is not None:
            self.observed[direction] = Observed(maxima, parts_of(query)[1], scores)
        return scores

    def weights(self, image: Encoded, caption: Encoded) -> Tensor:
        t2i = "t2i" in self.thresholds
        (queries, _), (items, mask) = (parts_of(rows) for rows in ((caption, image) if t2i else (image, caption)))
        shares = self.attend.shares(raw_scores(queries, items), mask, self._threshold("t2i" if t2i else "i2t"))[0]
        return shares if t2i else shares.mT

    def _state(self, direction: str) -> RelevanceThreshold:
        state = self.thresholds[direction]
        assert isinstance(state, RelevanceThreshold)
        return state

    def _threshold(self, direction: str) -> Tensor | float:
        """t in training; `eval_threshold` in evaluation, frozen."""
        return self._state(direction).in_force(None if self.training else self.eval_threshold)

    def training_terms(self, scores: Tensor, positives: Tensor, rows: int) -> dict[str, Tensor]:
        """Moves the thresholds; {"separation": scalar} when it is on, else {}. Scores that were gathered over ranks, which hold more
        images than `rows`, are samples of all ranks already, and are not summed over them again."""
        losses: list[Tensor] = []
        for direction, seen in self.observed.items():
            state = self._state(direction)
            matched, mismatched = samples(seen, positives if direction == "t2i" else positives.T, self.rule.mismatch, int(state.steps))
            if matched.numel() > 1:
                state.saw(matched.detach(), mismatched.detach())
            if self.separation.weight and matched.numel() > 1 and int(state.steps) >= self.rule.warmup_steps:
                loss = separation_loss(matched, mismatched, state.t.clone(), self.separation, self.rule.alpha)
                losses.append(self.separation.weight * seen.scores.shape[1] * loss)
            if self.rule.mode == "batch":
                state.update(matched.detach(), mismatched.detach(), everywhere=len(scores) != rows)
        self.observed = {}
        return {"separation": torch.stack(losses).sum()} if losses else {}


def _sum(directions: Iterable[str], images: Encoded, captions: Encoded, scores: Callable[[str, Encoded, Encoded], Tensor]) -> Tensor:
    """(I,T) of scores(direction, query, context) (Nc,Nq) of every direction."""
    found = [scores(d, captions, images) if d == "t2i" else scores(d, images, captions).T for d in directions]
    return torch.stack(found).sum(0) if len(found) > 1 else found[0]


def _recorded(o: UARDAOptions) -> dict[str, object]:
    """The options that a matcher folder names; folders of before say nothing of threshold_grad, so at its default it stays out."""
    return {name: value for name, value in o.items() if name != "threshold_grad" or value == "implicit"}


def _check(o: Choices, rule: ThresholdOptions) -> None:
    direction, weights, at, grad = o["direction"], o["weights"], o["eval_threshold"], o["threshold_grad"]
    if direction not in ("t2i", "i2t", "both") or weights not in ("softmax", "expm1", "scan"):
        raise ValueError(f"UARDA: direction is t2i, i2t or both and weights softmax, expm1 or scan, not {direction!r} and {weights!r}")
    if isinstance(at, str) and at not in ("t", "t_safe"):
        raise ValueError(f"UARDA: eval_threshold is t, t_safe or a number, not {at!r}")
    if rule.mode == "naaf_compat" and direction != "t2i":
        raise ValueError("UARDA: threshold.mode=naaf_compat knows direction=t2i only")
    if grad not in ("constant", "implicit"):
        raise ValueError(f"UARDA: threshold_grad is constant or implicit, not {grad!r}")
    if grad == "implicit" and (weights, rule.mode) != ("expm1", "batch"):
        raise ValueError("UARDA: threshold_grad=implicit needs weights=expm1, as t cancels in softmax weights, and threshold.mode=batch")


def _read(model: type[Model], options: Options | None) -> Model:
    try:
        return model(**(options or {}))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"UARDA {model.__name__}: {problems}; known: {', '.join(model.model_fields)}") from None
