"""One self-contained HTML page about soft-label stores: their figures side by side, and the nearest neighbours of a few samples.

A person judges the neighbours: do these images, or captions, mean the same? Layout in templates/stores.html.j2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from itm.report.page import templates
from itm.teachers.inspection import Figures, Place, table_of


@dataclass(frozen=True)
class Shown:
    """What a page shows of a sample: a data URI ("" without an image), and its captions by id."""

    thumbnail: str = ""
    captions: Mapping[str, str] = field(default_factory=dict)


def render_stores(title: str, figures: Sequence[Figures], shown: Mapping[Place, Shown], receipt: str, note: str = "") -> str:
    """The page as HTML text. receipt: what the page was made from, kept in it; note: what is not on it, and why."""
    stores = [f"{f.store.modality} {f.store.teacher}" for f in figures]
    # The same samples were asked of every store: query k of each stands side by side.
    asked = [[(f.store.modality, f.neighbours[k]) for f in figures] for k in range(min(len(f.neighbours) for f in figures))]
    return (
        templates()
        .get_template("stores.html.j2")
        .render(title=title, stores=stores, figures=figures, table=table_of(figures), asked=asked, shown=shown, receipt=receipt, note=note)
    )
