"""Small inline SVG charts for the report: curves and a two-class histogram. No scripts; colours are CSS classes of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30

Series = dict[str, list[tuple[float, float]]]


def curves(series: Series, x_name: str, y_name: str) -> str:
    """One line a series of (x, y) points, with a legend. '' when there is nothing to draw."""
    series = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs, ys = ([p[axis] for points in series.values() for p in points] for axis in (0, 1))
    frame = _Frame((min(xs), max(xs)), (min(0.0, *ys), max(ys)))
    lines = [
        f'<polyline class="line c{place % 6}" points="{" ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)}"/>'
        for place, points in enumerate(series.values())
    ]
    return f"<figure>{frame.svg(''.join(lines), x_name, y_name)}{_legend(list(series))}</figure>"


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
            parts.append(f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>')
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
