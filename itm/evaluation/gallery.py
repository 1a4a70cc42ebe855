"""What a report shows beside the numbers: retrievals that went right and wrong, and how positives and negatives are scored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from itm.evaluation.protocols import Scored

HITS = 5
BINS = 48


def examples(scored: Scored, each: int = 4) -> dict[str, list[dict[str, Any]]]:
    """`i2t` and `t2i`: up to `each` queries whose top hit is right and as many whose top hit is wrong, evenly spread over the split.

    A hit is right when the pair is annotated or, where the source knows, when it truly holds. Rows are JSON-able:
    query, right, rank (1 = top) of the annotated pair, hits [{row, score, annotated, holds}].
    """
    scores = torch.as_tensor(scored.scores)
    annotated = scored.names.positive_matrix()
    truth = annotated if scored.relevance is None else scored.relevance
    return {
        "t2i": _one_way(scores.T, annotated.T, truth.T, each),
        "i2t": _one_way(scores, annotated, truth, each),
    }


def histogram(scored: Scored, bins: int = BINS) -> dict[str, list[float]]:
    """Share of positive and of negative pairs in each of `bins` equal score intervals; `edges` has bins + 1 values."""
    scores = torch.as_tensor(scored.scores).double()
    positives = scored.names.positive_matrix() if scored.relevance is None else scored.relevance
    finite = scores.isfinite()
    low, high = float(scores[finite].min()), float(scores[finite].max())
    high = high if high > low else low + 1.0
    share = {
        name: (counts / counts.sum().clamp(min=1)).tolist()
        for name, chosen in (("positives", positives), ("negatives", ~positives))
        for counts in [torch.histc(scores[chosen & finite], bins, low, high)]
    }
    return {"edges": torch.linspace(low, high, bins + 1).tolist(), **share}


def _one_way(scores: Tensor, annotated: Tensor, truth: Tensor, each: int) -> list[dict[str, Any]]:
    top = scores.argmax(1)
    right = truth[torch.arange(len(scores)), top]
    chosen = [*_spread(right.nonzero()[:, 0], each), *_spread((~right).nonzero()[:, 0], each)]
    return [_row(query, scores[query], annotated[query], truth[query]) for query in chosen]


def _spread(rows: Tensor, each: int) -> list[int]:
    places = torch.linspace(0, len(rows) - 1, min(each, len(rows))).round().long()
    return rows[places].tolist()


def _row(query: int, scores: Tensor, annotated: Tensor, truth: Tensor) -> dict[str, Any]:
    best = scores[annotated].max()
    hits = scores.topk(min(HITS, len(scores))).indices.tolist()
    shown = [{"row": h, "score": float(scores[h]), "annotated": bool(annotated[h]), "holds": bool(truth[h])} for h in hits]
    return {"query": query, "right": shown[0]["holds"], "rank": int((scores[~annotated] >= best).sum()) + 1, "hits": shown}
