"""The parts of the report page that go beyond one evaluation: what the matcher does inside, other protocols, and a second run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from itm.report.charts import curves
from itm.report.pictures import Drawn, Inside, distances, fit_drawings, inside_of, lacks_of, likeness, maxima_drawing
from itm.report.shown import Page
from itm.report.side_by_side import found_by_rank, score_curves

WAYS = {"t2i": "text to image", "i2t": "image to text"}


class Protocol(NamedTuple):
    """Another evaluation of the same weights: its name in MLflow, what it is in words, and rows of metric, value, chance."""

    name: str
    about: str
    counts: str
    rows: list[tuple[str, str, str]]


class Thresholds(NamedTuple):
    """Of one direction: the two Gaussians as training went on, and the similarities of some pairs at its end."""

    direction: str
    fits: list[Drawn]
    maxima: Markup
    about: str


class Sections(NamedTuple):
    protocols: list[Protocol]
    inside: Inside
    pair: Mapping[str, Any]
    thresholds: list[Thresholds]
    soft_labels: Mapping[str, Any]
    likeness: list[Drawn]
    charts: dict[str, Markup]
    disagreements: Mapping[str, Any]
    missing: list[str]


def sections_of(page: Page, runs: Mapping[str, Mapping[str, Any]]) -> Sections:
    """runs: the evaluations that are compared, this one among them; nothing to compare where it is alone."""
    pictures = page.pictures
    models, batch = pictures.get("models", {}), pictures.get("batch", {})
    soft = batch.get("soft_labels", {})
    compared = len(runs) > 1
    charts = {f"queries answered by rank, {title}": found_by_rank(runs, way) for way, title in WAYS.items()} if compared else {}
    if compared:
        charts["scores of pairs"] = score_curves(runs)
        known = {page.title: page.validations, **page.other_validations}
        validated = {name: known.get(name, ()) for name in runs}  # a run has one colour in all charts
        together = {name: [(row["step"], row["rsum"]) for row in rows if "rsum" in row] for name, rows in validated.items()}
        charts["validation: rSum"] = curves(together, "step", "rSum") if sum(map(bool, together.values())) > 1 else ""
    return Sections(
        protocols=[_protocol(name, found) for name, found in page.protocols.items()],
        inside=inside_of(models)._replace(looks=[]) if page.evaluation.get("attention") else inside_of(models),
        pair=pictures.get("pair", {}),
        thresholds=list(_thresholds(pictures)),
        soft_labels=soft,
        likeness=likeness(soft["histograms"]) if soft else [],
        charts={title: Markup(chart) for title, chart in charts.items() if chart},
        disagreements=page.disagreements,
        missing=[*page.missing, *pictures.get("lacks", []), *lacks_of(models), *batch.get("lacks", [])],
    )


def training_charts(page: Page) -> dict[str, str]:
    """Title -> figure of what is measured in training for a picture alone."""
    return {
        "distance of relations (ISD), validation": distances(page.validations),
        "the same by annotated entities (ISDa), validation": distances(page.validations, annotated=True),
    }


def _thresholds(pictures: Mapping[str, Any]) -> Any:
    fits, maxima = pictures.get("fits", {}), pictures.get("batch", {}).get("maxima", {})
    spread = maxima.get("directions", {})
    for direction in dict.fromkeys((*fits, *spread)):
        drawn = maxima_drawing(spread[direction]) if direction in spread else Markup()
        about = (
            f"{spread[direction]['fragments']:,} fragments of {maxima['pairs']} pairs of {maxima['split']}" if direction in spread else ""
        )
        yield Thresholds(direction, fit_drawings(fits[direction]) if direction in fits else [], drawn, about)


def _protocol(name: str, found: Mapping[str, Any]) -> Protocol:
    chance = found.get("chance", {})
    rows = [(metric, _number(value), _number(chance[metric]) if metric in chance else "-") for metric, value in found["metrics"].items()]
    counts = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in found.get("counts", {}).items())
    return Protocol(name, found["protocol"], counts, rows)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"
