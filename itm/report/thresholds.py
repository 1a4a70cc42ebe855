"""UARDA in numbers: the words that its threshold cuts from a pair, the maxima it parts, and its two Gaussians as training went on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from itm.data.formats import Json
from itm.matchers.late.base import parts_of, raw_scores
from itm.matchers.late.uarda import UARDA
from itm.matchers.late.uarda_separation import Observed, samples
from itm.matchers.late.uarda_threshold import RelevanceThreshold
from itm.types import Encoded, Matcher

BINS, EPOCHS = 40, 6
STATE = ("t", "t_safe", "mu_pos", "sigma_pos", "mu_neg", "sigma_neg")
Rows = Sequence[Mapping[str, float]]


def cut_of(matcher: Matcher, image: Encoded, caption: Encoded, spelled: list[str]) -> Json:
    """`words`; `best`: the similarity of each to the region most like it; for each direction the threshold in force and whether it cuts
    the word, which then has no part in the score. Raises ValueError for other kinds."""
    if not isinstance(matcher, UARDA):
        raise ValueError(f"{matcher.kind} has no threshold: uarda has one")
    best = _raw(image, caption)[0, 0].masked_fill(~parts_of(image)[1][0], -torch.inf).amax(-1).tolist()
    shown = [(word, best[place]) for place, word in enumerate(spelled[: len(best)]) if word]
    ways = {}
    for direction, state in _states(matcher).items():
        t = float(state.in_force(matcher.eval_threshold))
        ways[direction] = {"t": t, "cut": [value <= t for _, value in shown]}
    return {"words": [word for word, _ in shown], "best": [round(value, 6) for _, value in shown], "directions": ways}


def maxima_of(matcher: UARDA, images: Encoded, captions: Encoded, own: Tensor, scores: Tensor) -> Json:
    """By direction: how the maxima of matched and of mismatched fragments of these pairs spread, chosen as training chooses them.

    own (I,T) bool: which pairs are annotated; scores (I,T). `edges` of equal intervals, `matched` and `mismatched` as densities (their
    sum times the interval is 1), the mean and deviation of each, the numbers behind, and the matcher's own state.
    """
    found = {}
    for direction, state in _states(matcher).items():
        t2i = direction == "t2i"
        query, context = (captions, images) if t2i else (images, captions)
        (queries, query_mask), (items, context_mask) = parts_of(query), parts_of(context)
        raw = raw_scores(queries, items).masked_fill(~context_mask[:, None, None, :], -torch.inf)
        seen = Observed(raw.amax(-1), query_mask, scores if t2i else scores.T)
        pair = samples(seen, own if t2i else own.T, matcher.rule.mismatch, 0)
        if min(len(values) for values in pair) < 2:
            continue
        found[direction] = _spread(*pair) | {"state": {name: value for name, value in state.report().items() if name in STATE}}
    return found


def _spread(matched: Tensor, mismatched: Tensor) -> Json:
    low, high = (float(edge) for edge in (torch.cat([matched, mismatched]).min(), torch.cat([matched, mismatched]).max()))
    high = high if high > low else low + 1e-3
    width = (high - low) / BINS
    shares = {
        name: (torch.histc(values.float(), BINS, low, high) / (len(values) * width)).tolist()
        for name, values in (("matched", matched), ("mismatched", mismatched))
    }
    moments = {f"{name}_mean": float(values.double().mean()) for name, values in (("matched", matched), ("mismatched", mismatched))}
    moments |= {f"{name}_deviation": float(values.double().std()) for name, values in (("matched", matched), ("mismatched", mismatched))}
    return {"edges": torch.linspace(low, high, BINS + 1).tolist(), **shares, **moments, "fragments": len(matched)}


def fits_of(losses: Rows, steps_per_epoch: float | None) -> dict[str, list[Json]]:
    """By direction, the two fitted Gaussians and both thresholds at the end of some epochs (at some logged steps of a training of one
    epoch, or where its length is not known), evenly spread, the last one among them. Nothing where no Gaussian was fitted yet."""
    found: dict[str, list[Json]] = {}
    for direction in ("t2i", "i2t"):
        ending = f".thresholds.{direction}."
        key = next((name.partition(ending)[0] + ending for row in losses for name in row if ending in name), None)
        if key is None:
            continue
        rows = [row for row in losses if row.get(f"{key}sigma_pos", 0.0) > 0]
        chosen = _at_epochs(rows, steps_per_epoch)
        found[direction] = [{**_about(row, steps_per_epoch), **{name: row[f"{key}{name}"] for name in STATE}} for row in chosen]
    return {direction: rows for direction, rows in found.items() if rows}


def _at_epochs(rows: Rows, steps_per_epoch: float | None) -> Rows:
    if steps_per_epoch and rows:
        ends = {math.ceil(row["step"] / steps_per_epoch): row for row in rows}  # the last of each epoch stays
        rows = [ends[epoch] for epoch in sorted(ends)] if len(ends) > 1 else rows
    places = torch.linspace(0, len(rows) - 1, min(EPOCHS, len(rows))).round().long().unique().tolist() if rows else []
    return [rows[place] for place in places]


def _about(row: Mapping[str, float], steps_per_epoch: float | None) -> Json:
    """The step, and the epoch that it lies in."""
    return {"step": row["step"]} | ({"epoch": math.ceil(row["step"] / steps_per_epoch)} if steps_per_epoch else {})


def _raw(image: Encoded, caption: Encoded) -> Tensor:
    """(1,1,L,R)."""
    return raw_scores(parts_of(caption)[0], parts_of(image)[0])


def _states(matcher: UARDA) -> dict[str, RelevanceThreshold]:
    return {name: state for name, state in matcher.thresholds.items() if isinstance(state, RelevanceThreshold)}
