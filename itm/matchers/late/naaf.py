"""NAAF's own way to move a threshold: caption by caption, within the batch, with the errors of its code.

`threshold.mode=naaf_compat` of UARDA trains with it, to compare with the published numbers (docs/methods/uarda.md#naaf-walk).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from itm.matchers.late.uarda_attention import Attention
from itm.matchers.late.uarda_threshold import RelevanceThreshold


def walked_scores(
    attention: Attention, state: RelevanceThreshold, alpha: float, raw: Tensor, grams: Tensor, masks: tuple[Tensor, Tensor]
) -> Tensor:
    """(I,T) scores of a training batch, each caption scored with the threshold that the captions before it have left; moves `state`.

    Captions are walked longest first, in their order where they are equally long, as NAAF's loader sorts a batch.
    raw (I,T,L,R), grams (I,R,R), masks = words (T,L), regions (I,R); see `Attention.relevance`.
    """
    mask, context_mask = masks
    order = mask.sum(1).argsort(descending=True, stable=True)
    columns: list[Tensor] = []

    def score(place: int, t: float) -> Tensor:
        caption = order[place]
        relevance = attention.relevance(raw[:, caption : caption + 1], grams, context_mask, t)[:, 0]
        columns.append(relevance[:, mask[caption]].mean(-1))
        return columns[-1].detach()[order]

    mp, sp, mn, sn = state.statistics.tolist()
    walk = NaafState(float(state.t), float(state.t_safe), (mp, sp, mn, sn))
    maxima = raw.detach().masked_fill(~context_mask[:, None, None, :], -torch.inf).amax(-1)
    naaf_walk(maxima[order][:, order], mask[order], score, walk, alpha)
    state.t.fill_(walk.t)
    state.t_safe.fill_(walk.t_safe)
    state.statistics.copy_(torch.tensor(walk.statistics))
    return torch.stack(columns, 1)[:, order.argsort()]


@dataclass
class NaafState:
    """Threshold and statistics while NAAF's code walks through a batch (docs/methods/uarda.md#naaf-walk)."""

    t: float
    t_safe: float
    statistics: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


def own_first(caption: int, scores: Tensor) -> tuple[int, int]:
    """(best, worst) row of a caption's scores (I,). Where rows tie, the best is the caption's own, and the worst the first of them.

    NAAF sorts unstably, so that among equal scores (an image that stands in the batch twice) any row may come first.
    """
    best = caption if bool(scores[caption] == scores.max()) else int(scores.argmax())
    return best, int(scores.argmin())


def naaf_walk(
    maxima: Tensor,
    mask: Tensor,
    score: Callable[[int, float], Tensor],
    state: NaafState,
    alpha: float,
    choose: Callable[[int, Tensor], tuple[int, int]] = own_first,
) -> list[float]:
    """NAAF's sequential update over the captions of a batch; changes `state`, returns the threshold in force for each caption.

    maxima (I,T,L) row maxima, mask (T,L), score(caption, t) -> (I,) scores, choose(caption, scores) -> (best, worst) row. Only a caption
    whose best row is its own is pooled, and only after it the thresholds can move; each caption puts them to 0 while fewer than 200
    words are pooled. Keeps the errors of the original: see `naaf_threshold`.
    """
    matched: list[Tensor] = []
    mismatched: list[Tensor] = []
    used, words = [], 0
    for caption in range(maxima.shape[1]):
        used.append(state.t)
        best, worst = choose(caption, score(caption, state.t))
        if best == caption:
            rows = maxima[:, caption, mask[caption]]
            matched.append(rows[caption])
            mismatched.append(rows[worst])
            words += rows.shape[1]
            if words > 200:
                _move(state, matched, mismatched, alpha)
        if words < 200:
            state.t = state.t_safe = 0.0
    return used


def _move(state: NaafState, matched: list[Tensor], mismatched: list[Tensor], alpha: float) -> None:
    mp, sp, mn, sn = state.statistics = _pooled(matched, mismatched)
    best, discriminant = naaf_threshold(mp, sp, mn, sn, alpha)
    if discriminant > 0:
        state.t = 0.7 * _in_unit(best) + 0.3 * state.t
        state.t_safe = 0.7 * _in_unit(mp - 3 * sp) + 0.3 * state.t_safe


def naaf_threshold(mp: float, sp: float, mn: float, sn: float, alpha: float) -> tuple[float, float]:
    """(root, discriminant) as NAAF's code computes them: wrong for near-equal variances, blind to bounds. NaN: no root.

    See docs/methods/uarda.md#naaf-walk.
    """
    a, b = sp**2 - sn**2, 2 * (mp * sn**2 - mn * sp**2)
    c = (sp * mn) ** 2 - (sn * mp) ** 2 + 2 * (sp * sn) ** 2 * math.log(sn / (alpha * sp) + 1e-8)
    e = b**2 - 4 * a * c
    return ((-b + math.sqrt(e)) / (2 * a + 1e-10) if e > 0 else math.nan), e


def _pooled(matched: list[Tensor], mismatched: list[Tensor]) -> tuple[float, float, float, float]:
    positive, negative = torch.cat(matched), torch.cat(mismatched)
    return positive.mean().item(), positive.std().item(), negative.mean().item(), negative.std().item()


def _in_unit(x: float) -> float:
    return x if 0 <= x <= 1 else 0.0
