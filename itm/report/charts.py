"""Small inline SVG charts for the report: curves and a two-class histogram. No scripts; colours are CSS classes of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30

Series = dict[str, list[tuple[float, float]]]


def curves(series: Series, x_name: str, y_name: str, labels: Sequence[str] = ()) -> str:
    """One line a series of (x, y) points, with a legend. '' when there is nothing to draw. labels: what stands under x = 0.5, 1.5, ..."""
    series = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs, ys = ([p[axis] for points in series.values() for p in points] for axis in (0, 1))
    frame = _Frame((0.0, float(len(labels))) if labels else (min(xs), max(xs)), (min(0.0, *ys), max(ys)))
    lines = [
        f'<polyline class="line c{place % 6}" points="{" ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)}"/>'
        for place, points in enumerate(series.values())
    ]
    return f"<figure>{frame.svg(''.join(lines), x_name, y_name, labels)}{_legend(list(series))}</figure>"


def histogram(edges: Sequence[float], shares: dict[str, Sequence[float]], x_name: str) -> str:
    """Overlaid bars: for each class its share of pairs per score interval."""
    top = max(max(values) for values in shares.values())
    frame = _Frame((edges[0], edges[-1]), (0.0, top or 1.0))
    bars = []
    for place, values in enumerate(shares.values()):
        for low, high, value in zip(edges, edges[1:], values, strict=False):
            if value:
                x, y = frame.x(low), frame.y(value)
                size = f'width="{max(frame.x(high) - x - 0.6, 0.6):.1f}" height="{frame.y(0) - y:.1f}"'
                bars.append(f'<rect class="bar c{place}" x="{x:.1f}" y="{y:.1f}" {size}/>')
    return f"<figure>{frame.svg(''.join(bars), x_name, 'share of pairs')}{_legend(list(shares))}</figure>"


def densities(edges: Sequence[float], shares: dict[str, Sequence[float]], lines: Series, marks: dict[str, float], x_name: str) -> str:
    """Bars of each class between `edges`, lines over them in the colours of the classes, and upright marks with their names."""
    xs = [x for points in lines.values() for x, _ in points] + [*edges] + [*marks.values()]
    ys = [y for points in lines.values() for _, y in points] + [v for values in shares.values() for v in values]
    frame = _Frame((min(xs), max(xs)), (0.0, max(ys)))
    parts = []
    for place, values in enumerate(shares.values()):
        for low, high, value in zip(edges, edges[1:], values, strict=False):
            if value:
                size = f'width="{max(frame.x(high) - frame.x(low) - 0.6, 0.6):.1f}" height="{frame.y(0) - frame.y(value):.1f}"'
                parts.append(f'<rect class="bar c{place}" x="{frame.x(low):.1f}" y="{frame.y(value):.1f}" {size}/>')
    for place, points in enumerate(lines.values()):
        drawn = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line c{place % 6}" points="{drawn}"/>')
    for place, value in enumerate(marks.values()):
        x = frame.x(value)
        parts.append(f'<line class="mark m{place}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    named = _legend(list(lines) or list(shares)).removesuffix("</figcaption>") or "<figcaption>"
    named += "".join(f'<span class="key upright m{n}">{escape(name)} {value:.3f}</span>' for n, (name, value) in enumerate(marks.items()))
    return f"<figure>{frame.svg(''.join(parts), x_name, 'density')}{named}</figcaption></figure>"


def bars(labels: Sequence[str], shares: dict[str, Sequence[float]], marks: Sequence[float], mark: str, x_name: str, y_name: str) -> str:
    """Bars side by side, one of each class a label; marks: a tick at each label, which `mark` names, e.g. what chance would give."""
    top = max(max(values) for values in (*shares.values(), marks))
    frame = _Frame((0.0, float(len(labels))), (0.0, top or 1.0))
    parts = []
    wide = (frame.x(1) - frame.x(0)) * 0.8 / len(shares)
    for place, values in enumerate(shares.values()):
        for n, value in enumerate(values):
            x, y = frame.x(n + 0.1) + place * wide, frame.y(value)
            parts.append(f'<rect class="bar c{place}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{frame.y(0) - y:.1f}"/>')
    for n, value in enumerate(marks):
        y = frame.y(value)
        parts.append(f'<line class="mark" x1="{frame.x(n + 0.06):.1f}" x2="{frame.x(n + 0.94):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    named = _legend([*shares]) if len(shares) > 1 else ""
    named = (named or "<figcaption></figcaption>").replace("</figcaption>", f'<span class="key chance">{escape(mark)}</span></figcaption>')
    return f"<figure>{frame.svg(''.join(parts), x_name, y_name, labels)}{named}</figure>"


def matrix(rows: Sequence[Sequence[float]], names: tuple[Sequence[str], Sequence[str]], most: float | None = None) -> str:
    """A square for each value, the fuller the larger, full at `most` (unset: the largest). names: of the rows, of the columns."""
    most = most or max(max(row) for row in rows) or 1.0
    cell = 24 if len(rows[0]) <= 14 else 15 if len(rows[0]) <= 40 else 8
    left, top = (8 + round(6.2 * max(len(text) for text in side)) for side in names)
    wide, high = left + cell * len(rows[0]), top + cell * len(rows)
    parts = []
    if cell > 10:
        for n, text in enumerate(names[0]):
            parts.append(f'<text x="{left - 5}" y="{top + (n + 0.5) * cell + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        for n, text in enumerate(names[1]):
            x, y = left + (n + 0.5) * cell + 4, top - 5
            parts.append(f'<text transform="translate({x:.1f},{y}) rotate(-90)">{escape(text)}</text>')
    for r, row in enumerate(rows):
        for c, value in enumerate(row):
            told = f"<title>{escape(names[0][r])}, {escape(names[1][c])}: {value:.3f}</title>"
            place = f'x="{left + c * cell}" y="{top + r * cell}" width="{cell - 1}" height="{cell - 1}"'
            shown = f'<rect class="cell" {place} fill-opacity="{min(value / most, 1.0):.3f}">{told}</rect>'
            parts.append(f'<rect class="ground" {place}/>{shown}')
    sized = f'viewBox="0 0 {wide} {high}" style="width:{wide}px"'
    return f'<div class="scroll"><svg class="matrix" {sized} role="img" aria-label="matrix">{"".join(parts)}</svg></div>'


def meter(value: float, chance: float | None, most: float) -> str:
    """A bar of value/most with a tick where chance lies."""
    share = 100 * min(max(value / most, 0.0), 1.0)
    tick = "" if chance is None else f'<i style="left:{100 * min(chance / most, 1.0):.2f}%" title="chance"></i>'
    return f'<span class="meter"><b style="width:{share:.2f}%"></b>{tick}</span>'


class _Frame:
    """Maps data to the drawing and draws axes with round ticks."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self.xs = xs if xs[1] > xs[0] else (xs[0], xs[0] + 1)
        self.ys = ys if ys[1] > ys[0] else (ys[0], ys[0] + 1)

    def x(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM)

    def svg(self, inside: str, x_name: str, y_name: str, labels: Sequence[str] = ()) -> str:
        """labels: what stands under the first units of x, in place of ticks."""
        parts = []
        for value in _ticks(*self.ys, 5):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        under = [(n + 0.5, text) for n, text in enumerate(labels)] or [(value, f"{value:g}") for value in _ticks(*self.xs, 7)]
        for value, text in under:
            parts.append(
                f'<text class="under" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'
            )
        parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_name)}</text>')
        label = f"{escape(y_name)} over {escape(x_name)}"
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}{inside}</svg>'


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 x 10^n inside [low, high], at most `most` + 1 of them."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _legend(names: list[str]) -> str:
    if len(names) < 2:
        return ""
    return "<figcaption>" + "".join(f'<span class="key c{n % 6}">{escape(name)}</span>' for n, name in enumerate(names)) + "</figcaption>"
