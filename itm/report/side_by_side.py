"""Runs laid over each other: the share of answers found by rank, and how far pairs that hold lie from those that do not, in one plot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from itm.report.charts import Series, curves

Evaluations = Mapping[str, Mapping[str, Any]]
FAR = 8.0  # standard deviations beyond which a score is drawn no more


def found_by_rank(runs: Evaluations, way: str) -> str:
    """A curve for each run: the percent of queries whose answer stands at a rank or before it; '' unless all runs ranked one gallery."""
    ranks = {name: run["ranks"][way] for name, run in runs.items() if way in run.get("ranks", {})}
    if len(ranks) != len(runs) or len({tuple(found["first"]) for found in ranks.values()}) != 1:
        return ""
    first = next(iter(ranks.values()))
    lasts = [b - 1 for b in (*first["first"][1:], first["gallery"] + 1)]
    series: Series = {name: _summed(found["share"]) for name, found in ranks.items()}
    series["chance"] = _summed(first["chance"])
    return curves(series, "rank or before", "percent of the queries", [f"{last:,}" for last in lasts])


def _summed(shares: Sequence[float]) -> list[tuple[float, float]]:
    return [(place + 0.5, 100 * value) for place, value in enumerate(itertools.accumulate(shares))]


def score_curves(runs: Evaluations) -> str:
    """For each run the density of scores of pairs that hold and of pairs that do not, in standard deviations of the latter from their
    mean: only so do scores of different models stand on one axis."""
    series: Series = {}
    for name, run in runs.items():
        if shares := run.get("histogram"):
            for kind, title in (("positives", "hold"), ("negatives", "do not")):
                series[f"{name}: {title}"] = standardised(shares, kind)
    return curves(series, "standard deviations from the mean of pairs that do not hold", "density")


def standardised(shares: Mapping[str, Sequence[float]], kind: str) -> list[tuple[float, float]]:
    """(middle of an interval, density) in units of the negatives' mean and deviation, as the histogram knows them."""
    edges, negatives = shares["edges"], shares["negatives"]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    mean = sum(m * share for m, share in zip(middles, negatives, strict=True))
    variance = sum((m - mean) ** 2 * share for m, share in zip(middles, negatives, strict=True))
    deviation = math.sqrt(variance) or 1.0
    width = (edges[1] - edges[0]) / deviation
    points = [((m - mean) / deviation, share / width) for m, share in zip(middles, shares[kind], strict=True)]
    points = [(points[0][0] - width, 0.0), *points, (points[-1][0] + width, 0.0)]  # beyond the histogram there is nothing
    return [(z, value) for z, value in points if abs(z) <= FAR]
