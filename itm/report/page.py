"""One self-contained HTML page about a run: numbers with chance, comparison, loss curves, score histogram, retrievals, lineage.

`render` is a pure function of `Page`; the stage collects the facts. Everything that comes from data or recipes is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from itm.report.charts import Series, curves, histogram, meter
from itm.report.style import STYLE

RECALLS = (("r1", "R@1"), ("r5", "R@5"), ("r10", "R@10"), ("semantic_r1", "semantic R@1"))
FRACTIONS = (("map_at_r", "mAP@R"), ("r_precision", "R-precision"))
RANKS = (("medr", "median rank"), ("meanr", "mean rank"))
TITLES = dict((*RECALLS, *FRACTIONS, *RANKS))
WAYS = {"t2i": "text to image", "i2t": "image to text", "i2i": "image to image", "t2t": "text to text"}
COMPARED = ("rsum", "t2i_r1", "i2t_r1", "t2i_semantic_r1", "i2t_semantic_r1", "t2i_map_at_r", "i2t_map_at_r")
PACE = ("lr", "samples_per_s", "rejected")


@dataclass(frozen=True)
class Page:
    """What the page shows. `evaluation`: the content of evaluation.json; `losses`: rows of losses.jsonl; `others`: name -> evaluation of
    the runs to compare with; `thumbnails`: image key -> data URI; `lineage`: label -> text."""

    title: str
    about: str
    evaluation: Mapping[str, Any]
    losses: Sequence[Mapping[str, float]] = ()
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    other_losses: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    thumbnails: Mapping[str, str] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)


def render(page: Page) -> str:
    """The whole page as HTML text."""
    sections = [
        _header(page),
        _section("Runs compared", _comparison(page), "Best of each column in green; judge a gain against the spread between seeds."),
        _section("Metrics", _metrics(page.evaluation), "The bar is the value, the tick is what a random order would score."),
        _section("Training", _training(page)),
        _section(
            "Scores of pairs", _histogram(page), "Each class is normalised by itself: the overlap is what the model cannot tell apart."
        ),
        _section(
            "Text finds images", _gallery(page, "t2i"), "Green: the pair holds. Four queries that went right, then four that went wrong."
        ),
        _section("Image finds text", _gallery(page, "i2t")),
        _section("Lineage", _lineage(page.lineage)),
    ]
    metas = ('charset="utf-8"', 'name="viewport" content="width=device-width,initial-scale=1"', 'name="color-scheme" content="light dark"')
    head = "".join(f"<meta {meta}>" for meta in metas) + f"<title>{escape(page.title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body><main>{''.join(sections)}</main></body></html>\n"


def _section(title: str, body: str, note: str = "") -> str:
    if not body:
        return ""
    return f"<section><h2>{title}</h2>{f'<p class=soft>{note}</p>' if note else ''}{body}</section>"


def _header(page: Page) -> str:
    metrics, chance = page.evaluation["metrics"], page.evaluation["chance"]
    tiles = [
        f"<div class=tile><span>{_title(name)}</span><b>{_value(name, metrics[name])}</b>"
        f"<span>{'chance ' + _value(name, chance[name]) if name in chance else '&nbsp;'}</span></div>"
        for name in (*COMPARED, "i2i_r1", "i2i_map_at_r", "t2t_r1", "t2t_map_at_r")
        if name in metrics
    ]
    counts = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in page.evaluation["counts"].items())
    protocol = f"{escape(page.evaluation['protocol'])} &middot; {escape(counts)} &middot; {escape(page.evaluation['score_type'])}"
    about = f"<p>{escape(page.about)}</p>" if page.about else ""
    return f"<header><h1>{escape(page.title)}</h1>{about}<small>{protocol}</small><div class=tiles>{''.join(tiles)}</div></header>"


def _comparison(page: Page) -> str:
    runs = _with_own(page.others, page.title, page.evaluation)
    if len(runs) < 2:
        return ""
    names = [name for name in COMPARED if all(name in run["metrics"] for run in runs.values())]
    best = {name: max(run["metrics"][name] for run in runs.values()) for name in names}
    head = "<tr><th>run</th>" + "".join(f"<th>{_title(name)}</th>" for name in names) + "</tr>"
    rows = []
    for title in runs:
        cells = "".join(
            f"<td{' class=best' if runs[title]['metrics'][name] == best[name] else ''}>{_value(name, runs[title]['metrics'][name])}</td>"
            for name in names
        )
        rows.append(f"<tr{' class=this' if title == page.title else ''}><td>{escape(title)}</td>{cells}</tr>")
    chance = "".join(f"<td>{_value(name, page.evaluation['chance'][name])}</td>" for name in names)
    table = f"<table>{head}{''.join(rows)}<tr class=chance><td>chance</td>{chance}</tr></table>"
    warning = "" if len({(run["split_hash"], run["protocol"]) for run in runs.values()}) == 1 else _warning()
    return f"{warning}<div class='card scroll'>{table}</div>"


def _with_own(others: Mapping[str, Any], title: str, own: Any) -> dict[str, Any]:
    """The runs in the order they were named; this run comes first when it was not named."""
    return dict(others) if title in others else {title: own, **others}


def _warning() -> str:
    return "<p class='mark bad'>These runs were measured on different data or protocols: the columns cannot be compared.</p>"


def _metrics(evaluation: Mapping[str, Any]) -> str:
    metrics, chance = evaluation["metrics"], evaluation["chance"]
    ways = [way for way in WAYS if any(name.startswith(f"{way}_") for name in metrics)]
    cards = []
    for way in ways:
        rows = []
        for name in (n.removeprefix(f"{way}_") for n in metrics if n.startswith(f"{way}_") and not n.endswith("r_mean")):
            key = f"{way}_{name}"
            bar = "" if name in dict(RANKS) else meter(metrics[key], chance.get(key), 1.0 if _is_fraction(key) else 100.0)
            known = _value(key, chance[key]) if key in chance else "-"
            title = TITLES.get(name, name.replace("_", " "))
            rows.append(f"<tr><td>{title}</td><td class=wide>{bar}</td><td>{_value(key, metrics[key])}</td><td>{known}</td></tr>")
        head = "<tr><th></th><th></th><th>value</th><th>chance</th></tr>"
        cards.append(f"<div class='card scroll'><h3>{WAYS[way]}</h3><table>{head}{''.join(rows)}</table></div>")
    return f"<div class=two>{''.join(cards)}</div>"


def _training(page: Page) -> str:
    names = list(dict.fromkeys(name for row in page.losses for name in row if name != "step"))
    heats = [n for n in names if "tau" in n or n.startswith("temperatures.")]
    followed = [n for n in names if ".thresholds." in n]
    cuts = [n for n in followed if n.endswith((".t", ".t_safe", ".mu_pos", ".mu_neg"))]
    terms = [n for n in names if n not in PACE and n not in heats + followed]
    # A single term is the loss itself; drawing both would hide one line under the other.
    shown = ["loss"] if "loss" in terms and len(terms) <= 2 else terms
    charts = {
        "loss and its terms": curves(_series(page.losses, shown), "step", "loss"),
        "temperatures": curves(_series(page.losses, heats), "step", "temperature"),
        "relevance threshold": curves(_series(page.losses, cuts), "step", "similarity"),
        "learning rate": curves(_series(page.losses, ["lr"]), "step", "learning rate"),
    }
    if page.other_losses:
        runs = _with_own(page.other_losses, page.title, page.losses)
        together: Series = {title: _series(rows, ["loss"]).get("loss", []) for title, rows in runs.items()}
        charts["loss of the compared runs (terms differ between methods)"] = curves(together, "step", "loss")
    cards = [f"<div class=card><h3>{title}</h3>{chart}</div>" for title, chart in charts.items() if chart]
    return f"<div class=two>{''.join(cards)}</div>" if cards else ""


def _series(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> Series:
    return {name: [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)] for name in names}


def _histogram(page: Page) -> str:
    shares = page.evaluation.get("histogram")
    if not shares:
        return ""
    classes = {"pairs that hold": shares["positives"], "pairs that do not": shares["negatives"]}
    return f"<div class=card>{histogram(shares['edges'], classes, 'score')}</div>"


def _gallery(page: Page, way: str) -> str:
    rows = page.evaluation.get("examples", {}).get(way, [])
    card = _text_query if way == "t2i" else _image_query
    return f"<div class=ask>{''.join(card(row, page.thumbnails) for row in rows)}</div>" if rows else ""


def _text_query(row: Mapping[str, Any], thumbnails: Mapping[str, str]) -> str:
    hits = "".join(
        f"<div class='hit{' good' if hit['holds'] else ''}'>{_thumb(hit['image'], thumbnails)}{hit['score']:.3f}</div>"
        for hit in row["hits"]
    )
    head = f"<div class=head><span class=quote>{escape(row['text'])}</span>{_mark(row)}</div>"
    return f"<div class=card>{head}<div class=hits>{hits}</div></div>"


def _image_query(row: Mapping[str, Any], thumbnails: Mapping[str, str]) -> str:
    texts = "".join(
        f"<li{' class=good' if hit['holds'] else ''}>{escape(hit['text'])}<span>{hit['score']:.3f}</span></li>" for hit in row["hits"]
    )
    side = f"<div class=hit>{_thumb(row['image'], thumbnails)}</div><div><p>{_mark(row)}</p><ol class=texts>{texts}</ol></div>"
    return f"<div class=card><div class=pair>{side}</div></div>"


def _thumb(key: str, thumbnails: Mapping[str, str]) -> str:
    inside = f'<img src="{thumbnails[key]}" alt="{escape(key)}" title="{escape(key)}">' if key in thumbnails else escape(key)
    return f"<div class=thumb>{inside}</div>"


def _mark(row: Mapping[str, Any]) -> str:
    word = "right" if row["right"] else "wrong"
    return f"<span class='mark {'good' if row['right'] else 'bad'}'>{word}, annotated pair at rank {row['rank']}</span>"


def _lineage(lineage: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(label)}</dt><dd><code>{escape(text)}</code></dd>" for label, text in lineage.items() if text)
    return f"<div class=card><dl>{rows}</dl></div>" if rows else ""


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
