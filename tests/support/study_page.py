"""The pages of the study on real photos: figures without a photo for docs/, and queries with their photos for whoever has the data."""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

METRICS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum")
HEADS = "i2t R@1 | R@5 | R@10 | t2i R@1 | R@5 | R@10 | rSum"
Result = dict[str, Any]


def spread(values: list[float]) -> str:
    """Mean and sample deviation; one value as it is."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(
    results: list[Result], name: str, chance: dict[str, float], row_of: Callable[[Result], str] = lambda r: str(r["row"])
) -> list[str]:
    """Rows in the order they come, each with its seeds; chance last."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        if result["table"] == name:
            rows.setdefault(row_of(result), []).append(result)
    lines = [f"| | seeds | {HEADS} |", "|---" * 9 + "|"]
    for row, found in rows.items():
        cells = " | ".join(spread([r["metrics"][metric] for r in found]) for metric in METRICS)
        lines.append(f"| {row} | {len(found)} | {cells} |")
    return [*lines, f"| chance | | {' | '.join(f'{chance[metric]:.1f}' for metric in METRICS)} |"]


def gains(results: list[Result], name: str, pairs: list[tuple[str, str]]) -> list[str]:
    """`a` less `b` in rSum, seed by seed: mean, deviation, and how many seeds have it above 0."""
    found = {(r["row"], r["seed"]): r["metrics"]["rsum"] for r in results if r["table"] == name}
    lines = ["| gain in rSum | seeds | mean ± sd | seeds above 0 |", "|---|---|---|---|"]
    for a, b in pairs:
        some = [found[a, seed] - found[b, seed] for row, seed in found if row == a and (b, seed) in found]
        if some:
            lines.append(f"| {a} over {b} | {len(some)} | {spread(some)} | {sum(gain > 0 for gain in some)} |")
    return lines


def queries(path: Path, shown: list[tuple[str, bytes, bytes, int]]) -> None:
    """A page of captions, each with its photo, the first wrong photo, and the rank of the right one (1 = first)."""
    from itm.report.thumbnails import data_uri

    rows = [
        f"<tr><td>{number}</td><td>{html.escape(text)}<br>the right photo is number {rank}</td>"
        f'<td><img src="{data_uri(right)}"></td><td><img src="{data_uri(wrong)}"></td></tr>'
        for number, (text, right, wrong, rank) in enumerate(shown, 1)
    ]
    head = "<tr><th></th><th>caption</th><th>its photo</th><th>first other photo</th></tr>"
    style = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td{padding:.5em;vertical-align:top}"
    about = "<p>Count the rows whose last photo the caption describes as well: what annotation calls an error there is none.</p>"
    page = f"<!doctype html><meta charset=utf-8><title>Queries</title><style>{style}</style>{about}<table>{head}{''.join(rows)}</table>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
