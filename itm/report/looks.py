"""Attention in pictures: the photo once for each word, dark where the word does not look, or with outlines of the regions it looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

SHOWN = 6  # words of a caption: those that look most sharply
REGIONS = 3  # outlined for a word
DARK = 0.78


class Word(NamedTuple):
    """A word, what lies over the photo for it, and the largest of its weights."""

    text: str
    overlay: Markup
    most: float


class Look(NamedTuple):
    """A caption with its image."""

    text: str
    image: str
    grid: bool
    words: list[Word]


def looks(attention: Sequence[Mapping[str, Any]]) -> list[Look]:
    """Of the `attention` of an evaluation (`itm.report.attended`)."""
    return [_look(row) for row in attention]


def _look(row: Mapping[str, Any]) -> Look:
    pairs = list(zip(row["words"], row["weights"], strict=True))
    sharpest = sorted(range(len(pairs)), key=lambda n: -max(pairs[n][1]) / (sum(pairs[n][1]) or 1.0))[:SHOWN]
    draw = _patches if row["grid"] else _regions
    words = [Word(pairs[n][0], Markup(_svg(draw(row["boxes"], pairs[n][1]))), max(pairs[n][1])) for n in sorted(sharpest)]
    return Look(row["text"], row["image"], row["grid"], words)


def _svg(inside: str) -> str:
    return f'<svg class="over" viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true">{inside}</svg>'


def _patches(boxes: Sequence[Sequence[float]], weights: Sequence[float]) -> str:
    """The darker the less the word looks there."""
    most = max(weights) or 1.0
    return "".join(_rect(box, f'fill="#000" fill-opacity="{DARK * (1 - w / most):.2f}"') for box, w in zip(boxes, weights, strict=True))


def _regions(boxes: Sequence[Sequence[float]], weights: Sequence[float]) -> str:
    """Outlines, strongest last, so that it lies on top."""
    most = max(weights) or 1.0
    chosen = sorted(range(len(boxes)), key=lambda n: weights[n])[-REGIONS:]
    return "".join(_rect(boxes[n], f'class="seen" stroke-opacity="{weights[n] / most:.2f}"') for n in chosen)


def _rect(box: Sequence[float], look: str) -> str:
    left, top, right, bottom = box
    return f'<rect x="{left:.4f}" y="{top:.4f}" width="{right - left:.4f}" height="{bottom - top:.4f}" {look}/>'
