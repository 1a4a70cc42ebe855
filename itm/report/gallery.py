"""What a report shows beside the numbers: retrievals that went right and wrong, and how positives and negatives are scored."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

from itm.evaluation.metrics import Streamed
from itm.evaluation.protocols import Scored
from itm.retrieval.scan import top

HITS = 5
BINS = 48
SAMPLE = 256  # queries that stand for all when the scores are never held whole, or are so many
WHOLE_PAIRS = 1 << 23


class Hit(TypedDict):
    """A row of the gallery that a query found."""

    row: int
    score: float
    annotated: bool
    holds: bool


class Example(TypedDict):
    """A query; rank (1 = top) is that of its best annotated pair, `answer`."""

    query: int
    right: bool
    rank: int
    hits: list[Hit]
    answer: Hit


def examples(scored: Scored, each: int = 4) -> dict[str, list[Example]]:
    """`i2t` and `t2i`: up to `each` queries whose top hit is right and as many whose top hit is wrong, evenly spread over the split.

    A hit is right when the pair is annotated or, where the source knows, when it truly holds.
    """
    return {way: _one_way(*rows_of(scored, way), each) for way in ("t2i", "i2t")}


def histogram(scored: Scored, bins: int = BINS) -> dict[str, list[float]]:
    """Share of positive and of negative pairs in each of `bins` equal score intervals; `edges` has bins + 1 values."""
    _, scores, _, positives = rows_of(scored, "i2t")
    scores = scores.double()
    finite = scores.isfinite()
    low, high = float(scores[finite].min()), float(scores[finite].max())
    high = high if high > low else low + 1.0
    share = {
        name: (counts / counts.sum().clamp(min=1)).tolist()
        for name, chosen in (("positives", positives), ("negatives", ~positives))
        for counts in [torch.histc(scores[chosen & finite], bins, low, high)]
    }
    return {"edges": torch.linspace(low, high, bins + 1).tolist(), **share}


def rows_of(scored: Scored, way: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (Q,) and their scores, annotated pairs and true pairs (Q,G): all of a small matrix, else evenly spread `SAMPLE`."""
    turned = way == "t2i"
    sampled = isinstance(scored.scores, Streamed) or math.prod(scored.scores.shape) > WHOLE_PAIRS
    images, captions = torch.arange(len(scored.names.image_keys)), scored.names.caption_image
    owners, gallery = (captions, images) if turned else (images, captions)
    asked = torch.tensor(_spread(torch.arange(len(owners)), SAMPLE)) if sampled else torch.arange(len(owners))
    rows = asked if sampled else slice(None)
    scores = torch.as_tensor((scored.scores.T if turned else scored.scores)[rows])
    annotated = owners[asked, None] == gallery
    if scored.relevance is None:
        return asked, scores, annotated, annotated
    return asked, scores, annotated, (scored.relevance.T if turned else scored.relevance)[rows]


def _one_way(queries: Tensor, scores: Tensor, annotated: Tensor, truth: Tensor, each: int) -> list[Example]:
    right = truth[torch.arange(len(scores)), scores.argmax(1)]
    chosen = [*_spread(right.nonzero()[:, 0], each), *_spread((~right).nonzero()[:, 0], each)]
    return [example(int(queries[row]), scores[row], annotated[row], truth[row]) for row in chosen]


def _spread(rows: Tensor, each: int) -> list[int]:
    places = torch.linspace(0, len(rows) - 1, min(each, len(rows))).round().long()
    return rows[places].tolist()


def example(query: int, scores: Tensor, annotated: Tensor, truth: Tensor) -> Example:
    best = int(scores.masked_fill(~annotated, -torch.inf).argmax())
    found = top(scores[None], HITS)[1][0].tolist()
    hits: list[Hit] = [{"row": h, "score": float(scores[h]), "annotated": bool(annotated[h]), "holds": bool(truth[h])} for h in found]
    answer: Hit = {"row": best, "score": float(scores[best]), "annotated": True, "holds": bool(truth[best])}
    rank = int((scores[~annotated] >= scores[best]).sum()) + 1
    return {"query": query, "right": hits[0]["holds"], "rank": rank, "hits": hits, "answer": answer}
