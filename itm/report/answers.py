"""What every query of an evaluation found, kept beside it, so that two runs can be laid side by side (`itm.report.disagreements`)."""

from __future__ import annotations

import torch

from itm.data.formats import Json
from itm.evaluation.protocols import Scored
from itm.report.disagreements import FORMAT
from itm.report.gallery import HITS, rows_of
from itm.retrieval.scan import top

MOST = 5000  # queries of a direction, evenly spread: all of Flickr30K's


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
        values, places = top(scores, HITS)
        best = scores.masked_fill(~annotated, -torch.inf).amax(1, keepdim=True)
        said[way] = {
            "query": queries.tolist(),
            "rank": (((scores >= best) & ~annotated).sum(1) + 1).tolist(),
            "hits": places.tolist(),
            "holds": truth.gather(1, places).int().tolist(),
            "scores": [[round(value, 5) for value in row] for row in values.tolist()],
        }
        seen[asked].update(said[way]["query"])
        seen[found].update(row for hits in said[way]["hits"] for row in hits)
    names = scored.names
    shards = names.image_shards or [""] * len(names.image_keys)
    texts = names.texts or names.caption_ids
    said["images"] = {str(row): [names.image_keys[row], shards[row]] for row in sorted(seen["images"])}
    said["captions"] = {str(row): [names.caption_ids[row], texts[row]] for row in sorted(seen["captions"])}
    return said
