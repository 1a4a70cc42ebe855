"""Pages about an index: images that are nearly the same, images that are never or always found, captions that fit other images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from itm.report.page import templates
from itm.retrieval.audit import AT, Duplicates, Fit, Reach
from itm.retrieval.index import Index

GROUPS, IMAGES, PAIRS, MEMBERS = 40, 60, 60, 12
"""What a page shows at most; what it counts is all."""
Photo = Callable[[int], str]
"""Row of an image -> its data URI, '' where it cannot be shown."""


def duplicates_page(index: Index, found: Duplicates, photo: Photo) -> str:
    shown = [
        {"alike": group.alike, "count": len(group.rows), "images": [_image(index, row, photo) for row in group.rows[:MEMBERS]]}
        for group in found.groups[:GROUPS]
    ]
    tiles = {
        "groups across splits": len(found.across),
        "images in them": sum(len(group.rows) for group in found.across),
        "groups in all": len(found.groups),
        "images": found.images,
    }
    about = (
        f"Images whose cosine is {found.alike:g} or more. A group over several splits leaks: what is learnt from in one is asked for in "
        "another. Those come first."
    )
    return _page("Near duplicates", index, tiles, about, groups=shown, left=max(0, len(found.groups) - GROUPS))


def reach_page(index: Index, found: Reach, photo: Photo) -> str:
    never, hubs = found.never, found.hubs
    tiles = {
        "never found": len(never),
        "found ten times too often": len(hubs),
        "images": len(found.rows),
        "captions asked": found.captions,
        "skewness": f"{found.skewness:.2f}",
    }
    about = (
        f"Every caption asked for its {AT} nearest images. An image that no caption finds cannot be found by words like these; one that is "
        f"found {AT} times as often as the mean crowds others out."
    )
    often = [_image(index, row, photo) | {"times": times, "share": times / found.captions} for row, times in hubs[:IMAGES]]
    return _page("Reach", index, tiles, about, often=often, never=[_image(index, row, photo) for row in never[:IMAGES]], left=0)


def captions_page(index: Index, found: Fit, photo: Photo) -> str:
    tiles = {"fit another image better": len(found.misfits), "captions": found.captions}
    about = "Captions to which another image is nearer than their own, those with the widest gap first: wrong captions stand at the top."
    pairs = [
        {
            "text": index.names.texts[one.caption],
            "id": index.names.caption_ids[one.caption],
            "own": _image(index, one.own, photo) | {"score": one.own_score},
            "other": _image(index, one.other, photo) | {"score": one.other_score},
            "before": one.before,
        }
        for one in found.misfits[:PAIRS]
    ]
    return _page("Captions of other images", index, tiles, about, pairs=pairs, left=max(0, len(found.misfits) - PAIRS))


def _image(index: Index, row: int, photo: Photo) -> dict[str, Any]:
    captions = index.captions_of(row)
    split = index.columns["split"][row].as_py()
    return {
        "key": index.names.image_keys[row],
        "split": split,
        "photo": photo(row),
        "text": index.names.texts[captions[0]] if captions else "",
    }


def _page(title: str, index: Index, tiles: dict[str, Any], about: str, **given: Any) -> str:
    facts = {"groups": [], "often": [], "never": [], "pairs": [], **given}
    shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in tiles.items()}
    return templates().get_template("audit.html.j2").render(title=title, place=index.place, tiles=shown, about=about, **facts)
