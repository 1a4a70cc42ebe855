"""One self-contained HTML page about a run: numbers with chance, comparison, loss curves, score histogram, retrievals, lineage.

`render` is a pure function of `Page`; the stage collects the facts. Layout and wording are in templates/page.html.j2, the look in
templates/style.css; here the figures become text. Everything that comes from data or recipes is escaped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from itm.report.charts import Series, bars, curves, histogram, meter
from itm.report.looks import looks
from itm.report.sections import sections_of, training_charts
from itm.report.shown import Evaluation, Losses, Page

RECALLS = (("r1", "R@1"), ("r5", "R@5"), ("r10", "R@10"), ("semantic_r1", "semantic R@1"))
FRACTIONS = (("map_at_r", "mAP@R"), ("r_precision", "R-precision"))
RANKS = (("medr", "median rank"), ("meanr", "mean rank"))
TITLES = dict((*RECALLS, *FRACTIONS, *RANKS))
WAYS = {"t2i": "text to image", "i2t": "image to text", "i2i": "image to image", "t2t": "text to text"}
COMPARED = ("rsum", "t2i_r1", "i2t_r1", "t2i_semantic_r1", "i2t_semantic_r1", "t2i_map_at_r", "i2t_map_at_r")
PACE = ("lr", "samples_per_s", "rejected")
TEMPLATES = Path(__file__).parent / "templates"
T = TypeVar("T")


class Figure(NamedTuple):
    """A metric as text; bar: its meter, or nothing; chance: '' where none is known."""

    title: str
    value: str
    chance: str
    bar: Markup = Markup()


class Cell(NamedTuple):
    """A metric of one compared run, and whether it is the best of its column."""

    text: str
    best: bool


class Run(NamedTuple):
    """A row of the comparison."""

    title: str
    cells: list[Cell]


class Comparison(NamedTuple):
    """Runs side by side; comparable: all were measured on the same split by the same protocol."""

    titles: list[str]
    runs: list[Run]
    chance: list[str]
    comparable: bool


class Way(NamedTuple):
    """The metrics of one direction."""

    title: str
    rows: list[Figure]


def render(page: Page) -> str:
    """The whole page as HTML text."""
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            page=page,
            counts=", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in page.evaluation["counts"].items()),
            tiles=_tiles(page.evaluation),
            comparison=_comparison(page),
            ways=_ways(page.evaluation),
            charts={title: Markup(chart) for title, chart in _charts(page).items() if chart},
            score_histogram=_histogram(page.evaluation.get("histogram")),
            ranks={WAYS[way]: Markup(_ranks(found)) for way, found in page.evaluation.get("ranks", {}).items()},
            examples={way: page.evaluation.get("examples", {}).get(way, []) for way in ("t2i", "i2t")},
            worst={way: page.evaluation.get("worst", {}).get(way, []) for way in ("t2i", "i2t")},
            looks=looks(page.evaluation.get("attention", [])),
            similar=page.evaluation.get("similar", {}),
            more=sections_of(page, _with_own(page.others, page.title, page.evaluation)),
            lineage={label: text for label, text in page.lineage.items() if text},
        )
    )


@cache
def templates() -> Environment:
    """The pages of this folder; everything that is filled in is escaped, and a name that is not given is an error."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )


def _tiles(evaluation: Evaluation) -> list[Figure]:
    names = (*COMPARED, "i2i_r1", "i2i_map_at_r", "t2t_r1", "t2t_map_at_r")
    return [_figure(name, evaluation) for name in names if name in evaluation["metrics"]]


def _figure(name: str, evaluation: Evaluation) -> Figure:
    chance = evaluation["chance"]
    return Figure(_title(name), _value(name, evaluation["metrics"][name]), _value(name, chance[name]) if name in chance else "")


def _comparison(page: Page) -> Comparison | None:
    """None when there is nothing to compare with."""
    runs = _with_own(page.others, page.title, page.evaluation)
    if len(runs) < 2:
        return None
    names = [name for name in COMPARED if all(name in run["metrics"] for run in runs.values())]
    best = {name: max(run["metrics"][name] for run in runs.values()) for name in names}
    rows = [
        Run(title, [Cell(_value(name, run["metrics"][name]), run["metrics"][name] == best[name]) for name in names])
        for title, run in runs.items()
    ]
    chance = [_value(name, page.evaluation["chance"][name]) for name in names]
    measured = {(run["split_hash"], run["protocol"]) for run in runs.values()}
    return Comparison(list(map(_title, names)), rows, chance, len(measured) == 1)


def _with_own(others: Mapping[str, T], title: str, own: T) -> dict[str, T]:
    """The runs in the order they were named; this run comes first when it was not named."""
    return dict(others) if title in others else {title: own, **others}


def _ways(evaluation: Evaluation) -> list[Way]:
    metrics = evaluation["metrics"]
    names = {way: [n for n in metrics if n.startswith(f"{way}_") and not n.endswith("r_mean")] for way in WAYS}
    return [Way(WAYS[way], [_row(way, name, evaluation) for name in found]) for way, found in names.items() if found]


def _row(way: str, name: str, evaluation: Evaluation) -> Figure:
    """A metric with its bar; ranks have none."""
    plain = name.removeprefix(f"{way}_")
    figure = _figure(name, evaluation)._replace(title=TITLES.get(plain, plain.replace("_", " ")))
    if plain in dict(RANKS):
        return figure
    bar = meter(evaluation["metrics"][name], evaluation["chance"].get(name), 1.0 if _is_fraction(name) else 100.0)
    return figure._replace(bar=Markup(bar))


def _charts(page: Page) -> dict[str, str]:
    """Title -> figure; '' where there is nothing to draw."""
    names = list(dict.fromkeys(name for row in page.losses for name in row if name != "step"))
    heats = [n for n in names if "tau" in n or n.startswith("temperatures.")]
    followed = [n for n in names if ".thresholds." in n]
    cuts = [n for n in followed if n.endswith((".t", ".t_safe", ".mu_pos", ".mu_neg"))]
    terms = [n for n in names if n not in PACE and n not in heats + followed]
    # A single term is the loss itself; drawing both would hide one line under the other.
    shown = ["loss"] if "loss" in terms and len(terms) <= 2 else terms
    recalls = {TITLES["r1"] + " " + WAYS[way]: _series(page.validations, [f"{way}_r1"])[f"{way}_r1"] for way in ("t2i", "i2t")}
    charts = {
        "validation: rSum": curves(_series(page.validations, ["rsum"]), "step", "rSum"),
        "validation: recall": curves(recalls, "step", "percent"),
        "loss and its terms": curves(_series(page.losses, shown), "step", "loss"),
        "temperatures": curves(_series(page.losses, heats), "step", "temperature"),
        "relevance threshold": curves(_series(page.losses, cuts), "step", "similarity"),
        "learning rate": curves(_series(page.losses, ["lr"]), "step", "learning rate"),
        **training_charts(page),
    }
    if page.other_losses:
        runs = _with_own(page.other_losses, page.title, page.losses)
        together: Series = {title: _series(rows, ["loss"]).get("loss", []) for title, rows in runs.items()}
        charts["loss of the compared runs (terms differ between methods)"] = curves(together, "step", "loss")
    return charts


def _series(rows: Losses, names: Sequence[str]) -> Series:
    return {name: [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)] for name in names}


def _ranks(found: Mapping[str, Any]) -> str:
    """Bars of the share of queries by the rank of their answer."""
    bounds = [*found["first"], found["gallery"] + 1]
    labels = [f"{a:,}" if b == a + 1 else f"≤ {b - 1:,}" for a, b in itertools.pairwise(bounds)]
    share, chance = ([100 * value for value in found[name]] for name in ("share", "chance"))
    return bars(labels, {"queries": share}, chance, "chance", "rank of the answer", "percent of the queries")


def _histogram(shares: Mapping[str, Sequence[float]] | None) -> Markup:
    if not shares:
        return Markup()
    classes = {"pairs that hold": shares["positives"], "pairs that do not": shares["negatives"]}
    return Markup(histogram(shares["edges"], classes, "score"))


def _title(name: str) -> str:
    way, _, rest = name.partition("_")
    return f"{TITLES.get(rest, rest)} {way}" if way in WAYS else {"rsum": "rSum"}.get(name, name)


def _is_fraction(name: str) -> bool:
    return name.endswith(tuple(key for key, _ in FRACTIONS))


def _value(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if _is_fraction(name):
        return f"{value:.3f}" if value >= 0.01 else f"{value:.4f}"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"
