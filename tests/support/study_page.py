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


def differences(results: list[Result], name: str, a: str, b: str) -> list[float]:
    """`a` less `b` in rSum, of the seeds that have both."""
    found = {(r["row"], r["seed"]): r["metrics"]["rsum"] for r in results if r["table"] == name}
    return [found[a, seed] - found[b, seed] for row, seed in found if row == a and (b, seed) in found]


def gains(results: list[Result], name: str, pairs: list[tuple[str, str]]) -> list[str]:
    """The differences of each pair: mean, deviation, the 95 % interval of the mean, and how many seeds have them above 0."""
    lines = ["| gain in rSum | seeds | mean ± sd | 95 % interval | seeds above 0 |", "|---|---|---|---|---|"]
    for a, b in pairs:
        if some := differences(results, name, a, b):
            interval = "" if len(some) < 2 else "{:+.1f} to {:+.1f}".format(*interval_of(some))
            lines.append(f"| {a} over {b} | {len(some)} | {spread(some)} | {interval} | {sum(gain > 0 for gain in some)} |")
    return lines if len(lines) > 2 else []


T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
"""Student's t, 97.5 %, by degrees of freedom."""


def interval_of(values: list[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean."""
    mean = statistics.mean(values)
    half = T_975[min(len(values) - 1, 5)] * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


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


def loop_table(tried: list[Result], setting: str = "InfoNCE's temperature, the students'") -> list[str]:
    """rSum: settings in rows, arms in columns."""
    order = ["base", "shuffled", "shuffled 0.1", "CUSA 0.1", "shuffled 0.2", "CUSA", "CUSA 0.2", "USA alone", "CSA alone"]
    columns = sorted({r["arm"] for r in tried}, key=order.index)
    lines = [f"| {setting} | runs | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for name in dict.fromkeys(r["setting"] for r in tried):
        found = {arm: [r["rsum"] for r in tried if (r["setting"], r["arm"]) == (name, arm)] for arm in columns}
        runs = min(len(values) for values in found.values())
        lines.append(f"| {name} | {runs} | {' | '.join(spread(values) if values else '' for values in found.values())} |")
    return lines


WIDTH, ROW, LEFT, FOOT = 720, 18, 210, 34


def gains_svg(groups: dict[str, dict[str, list[float]]]) -> str:
    """A dot for each seed's gain in rSum, a bar for their mean; groups: table -> what over what -> gains."""
    rows = [(table, name, values) for table, each in groups.items() for name, values in each.items() if values]
    every = [0.0, 1.0, *(value for *_, values in rows for value in values)]
    low, high = min(every), max(every)
    height = ROW * len(rows) + FOOT + 8
    parts = []

    def x(value: float) -> float:
        return LEFT + 8 + (value - low) / (high - low) * (WIDTH - LEFT - 24)

    def line(at: float, top: float, bottom: float, look: str) -> str:
        return f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{top:.1f}" y2="{bottom:.1f}" {look}/>'

    step = next(unit for unit in (1, 2, 5, 10, 20, 50, 100) if (high - low) / unit <= 10)
    for tick in range(-(int(-low) // step) * step, int(high) + 1, step):
        look = 'stroke="#444"' if tick == 0 else 'stroke="#ddd"'
        parts += [
            line(tick, 4, height - FOOT, look),
            f'<text x="{x(tick):.1f}" y="{height - FOOT + 14}" text-anchor="middle">{tick:+d}</text>',
        ]
    for number, (table, name, values) in enumerate(rows):
        y = 4 + ROW * (number + 0.5)
        parts.append(f'<text x="{LEFT}" y="{y + 4:.1f}" text-anchor="end">{html.escape(f"{table}: {name}")}</text>')
        parts.append(line(statistics.mean(values), y - 6, y + 6, 'stroke="#000" stroke-width="2"'))
        parts += [f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="3.5" fill="#2a6fb0" fill-opacity=".7"/>' for value in values]
    parts.append(f'<text x="{WIDTH - 8}" y="{height - 4}" text-anchor="end">gain in rSum, a dot a seed, the bar their mean</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">'
    return f'{head}<rect width="{WIDTH}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'


ABOUT = """# Real photos

`make study DATA=<folder>` makes this page: 600 COCO photos to learn from and 201 with 1,000 captions to be asked about, and real frozen
towers of the extra `real`: EfficientNet-Lite0 (ImageNet) for photos, MiniLM for sentences. Teachers are the same two models: the mean of
the grid cells less the mean of train, and the sentence vector. The shuffled control has the same vectors, each of another photo or caption.
Figures are of the last step; mean ± standard deviation over seeds. Every run trains on kept features
(`data.cache_features`). These are small models on few photos: rows are compared with each other, not with published figures."""
PLAIN_ABOUT = """The same setting in a loop of plain torch (`tests/support/study_loop.py`), which shares nothing with the pipeline but the
vectors: rSum on the same photos and captions (chance 15.8)."""
FOLDS_ABOUT = """How the setting was chosen among these four: rSum of the loop on a held-out sixth of train (100 photos; chance 31.6). Of
one run a difference of a few points says nothing. Which kinds of settings to compare was found by trying loops on the 201 photos too, so
that these are no untouched test."""
WHY = """What decides what soft labels do here:

- **The students' temperature.** Where CSA and USA use InfoNCE's own ("InfoNCE's own": it is learned, and ends at 0.025 to 0.05), a shuffled
  teacher harms, and the true one is well above it but little above no teacher. Where the students have a temperature of their own, from
  0.45 on, shuffled labels help on the folds too: so flat a term holds vectors apart like a second, softer InfoNCE, whatever the teacher
  says. Only what the true teacher has over the shuffled one is meaning.
- **InfoNCE's temperature.** A learned one serves the base better: from 0.07 on, the pipeline gave it 341.7 ± 2.7 (4 seeds). Against that,
  CUSA of the table above gains about as much over no teacher as over the shuffled one.
- **The teacher's temperature.** At 0.1 a row of the labels of 128 samples has 1 % (photos) and 5 % (captions) of its mass off the diagonal
  (`itm inspect`), so that true and shuffled labels are nearly the plain ones, and nearly the same. At 0.2 it is half.
- **How long one rate is kept.** 600 photos are learnt by heart: with one rate for 600 steps every column falls, that of the shuffled
  teacher at 0.2 by far the most, because its labels are learnt by heart as well.
- **How much was seen.** After 300 steps of 32, three passes over the captions, the three are one. After twelve passes the pairs are learnt
  by heart, labels of other photos too, and those harm; true ones do not:"""
QUERIES_ABOUT = """`make study` also writes a page of 50 captions, each with its photo and the first other one, which lies in `--runs`
and nowhere else. Read for CUSA's first seed: 19 captions find their photo first. In 3 of the other 31 the photo before it fits the caption
as well (a brick tower with a clock, a herd of sheep, a plate of many foods), so that 22 of 50 are right."""
