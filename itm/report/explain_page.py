"""One self-contained HTML page about one pair: photo, caption, scores, and what each matcher does inside with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from itm.report.page import templates
from itm.report.pictures import inside_of, lacks_of

PHOTO = 560  # pixels of the longer side


def render_pair(told: Mapping[str, Any], photo: str = "") -> str:
    """The page as HTML text. told: `pair`, `shards` and `models` as `itm explain --json` prints them; photo: a data URI, '' without."""
    models = told["models"]
    return templates().get_template("explain.html.j2").render(told=told, photo=photo, inside=inside_of(models), missing=lacks_of(models))
