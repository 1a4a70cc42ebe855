"""What every query of an evaluation found, kept beside it, so that two runs can be laid side by side: where A is right and B is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from itm.data.formats import Json
from itm.evaluation.protocols import Scored
from itm.report.gallery import HITS, rows_of

FORMAT = 1  # of <evaluation>.queries.json
MOST = 5000  # queries of a direction, evenly spread: all of Flickr30K's
EXAMPLES = 4


def answers(scored: Scored) -> Json:
    """For `t2i` and `i2t`: `query` ids, `rank` of the best annotated answer (1 = top), `hits` (rows),
    `scores`, `holds` (whether the pair does); `images` (key, shard) and `captions` (id, text) by row, as text, of the rows that occur."""
    said: Json = {"format": FORMAT}
    seen: dict[str, set[int]] = {"images": set(), "captions": set()}
    for way, (asked, found) in (("t2i", ("captions", "images")), ("i2t", ("images", "captions"))):
        queries, scores, annotated, truth = (rows for rows in rows_of(scored, way))
        if len(queries) > MOST:
            kept = torch.linspace(0, len(queries) - 1, MOST).round().long()
            queries, scores, annotated, truth = queries[kept], scores[kept], annotated[kept], truth[kept]
        top = scores.topk(min(HITS, scores.shape[1]))
        best = scores.masked_fill(~annotated, -torch.inf).amax(1, keepdim=True)
        said[way] = {
            "query": queries.tolist(),
            "rank": (((scores >= best) & ~annotated).sum(1) + 1).tolist(),
            "hits": top.indices.tolist(),
            "holds": truth.gather(1, top.indices).int().tolist(),
            "scores": [[round(value, 5) for value in row] for row in top.values.tolist()],
        }
        seen[asked].update(said[way]["query"])
        seen[found].update(row for hits in said[way]["hits"] for row in hits)
    names = scored.names
    shards = names.image_shards or [""] * len(names.image_keys)
    texts = names.texts or names.caption_ids
    said["images"] = {str(row): [names.image_keys[row], shards[row]] for row in sorted(seen["images"])}
    said["captions"] = {str(row): [names.caption_ids[row], texts[row]] for row in sorted(seen["captions"])}
    return said


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
    places = torch.linspace(0, len(names) - 1, min(EXAMPLES, len(names))).round().long().tolist() if names else []
    return [names[place] for place in places]
