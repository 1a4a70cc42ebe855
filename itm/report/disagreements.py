"""Where one run is right and another is wrong, of the answers that both kept (`itm.report.answers`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from itm.data.formats import Json

FORMAT = 1  # of answers*.json
EXAMPLES = 4


def disagreements(own: Mapping[str, Any], other: Mapping[str, Any]) -> Json:
    """For `t2i` and `i2t`: `queries` that both answered; `counts` of both right, only own, only other, neither; `own` and `other`:
    examples that only that one got right, evenly spread, each with the hits of both. Queries are matched by their ids."""
    said: Json = {}
    for way, asked in (("t2i", "captions"), ("i2t", "images")):
        ours, theirs = _by_id(own, way, asked), _by_id(other, way, asked)
        both = [name for name in ours if name in theirs]
        groups: dict[tuple[bool, bool], list[str]] = {(a, b): [] for a in (True, False) for b in (True, False)}
        for name in both:
            groups[_right(own[way], ours[name]), _right(other[way], theirs[name])].append(name)
        keys = {"both": (True, True), "own": (True, False), "other": (False, True), "neither": (False, False)}
        said[way] = {"queries": len(both), "counts": {name: len(groups[key]) for name, key in keys.items()}}
        for side in ("own", "other"):
            chosen = _spread(groups[keys[side]])
            said[way][side] = [{"own": _told(own, way, ours[name]), "other": _told(other, way, theirs[name])} for name in chosen]
    return said


def _by_id(said: Mapping[str, Any], way: str, asked: str) -> dict[str, int]:
    """Id of each query -> its place."""
    return {said[asked][str(row)][0]: place for place, row in enumerate(said[way]["query"])}


def _told(said: Mapping[str, Any], way: str, place: int) -> Json:
    """A query as the page's galleries take it, with keys and texts in place of rows."""
    asked, found = (_image, _caption) if way == "i2t" else (_caption, _image)
    mine = said[way]
    hits = zip(mine["hits"][place], mine["scores"][place], mine["holds"][place], strict=True)
    named = [{**found(said, row), "score": score, "holds": bool(holds)} for row, score, holds in hits]
    return {**asked(said, mine["query"][place]), "rank": mine["rank"][place], "right": _right(mine, place), "hits": named}


def _right(mine: Mapping[str, Any], place: int) -> bool:
    """Whether the first hit of a query holds."""
    return bool(mine["holds"][place][0])


def _image(said: Mapping[str, Any], row: int) -> Json:
    key, shard = said["images"][str(row)]
    return {"image": key, "shard": shard}


def _caption(said: Mapping[str, Any], row: int) -> Json:
    name, text = said["captions"][str(row)]
    return {"caption": name, "text": text}


def _spread(names: Sequence[str]) -> list[str]:
    """`EXAMPLES` of them at most, evenly."""
    wanted = min(EXAMPLES, len(names))
    return [names[round(place * (len(names) - 1) / max(wanted - 1, 1))] for place in range(wanted)]
