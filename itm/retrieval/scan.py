"""The best rows of a side for some questions, exactly: walked in blocks, of which only the best are kept.

Q = questions   N = rows of the side   B = rows of a block   K = answers kept
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

VECTOR_ROWS, PART_ROWS = 16384, 1024
"""Rows of a block: of vectors, and of parts, which are a hundred times as large."""
Scorer = Callable[[slice | Tensor], Tensor]
"""Rows of a side (B) -> scores (Q,B) float32."""


def blocks(count: int, rows: Tensor | None, size: int) -> Iterator[slice | Tensor]:
    """All rows in slices, or the given ones (N,) in pieces."""
    for start in range(0, count if rows is None else len(rows), size):
        yield slice(start, min(start + size, count)) if rows is None else rows[start : start + size]


def best(score: Scorer, count: int, rows: Tensor | None, k: int, size: int = VECTOR_ROWS) -> tuple[Tensor, Tensor]:
    """Scores (Q,K) and rows (Q,K) of the k best (fewer where there are fewer rows), best first; of equal scores the first row.

    count: rows of the side; rows: those that are asked, None = all. So k answers are the first k of k + 1 answers.
    """
    values, found = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for block in blocks(count, rows, size):
        scores = score(block)
        if values.shape[-1] < k or not len(values):
            values, found = _joined((values, found), _top(scores, block, k), k)
            continue
        better = (scores.amax(1) > values[:, -1]).nonzero()[:, 0]  # of few questions, once some blocks have been seen
        if len(better):
            values[better], found[better] = _joined((values[better], found[better]), _top(scores[better], block, k), k)
    return values, found


def _top(scores: Tensor, block: slice | Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, own = top(scores, k)
    return values, own + block.start if isinstance(block, slice) else block[own]


def _joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of both; of equal scores those of the first."""
    if not len(first[0]):
        return second
    values, order = torch.cat([first[0], second[0]], 1).sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), torch.cat([first[1], second[1]], 1).gather(1, order)[:, :k].contiguous()


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row of scores (Q,B) and their places, best first; of equal scores the first place."""
    width = scores.shape[1]
    values, places = scores.topk(min(k + 1, width))
    if width > k:
        for row in (values[:, k] == values[:, k - 1]).nonzero()[:, 0].tolist():  # which of the equal ones topk takes is not said
            edge = values[row, k]
            above = (scores[row] > edge).nonzero()[:, 0]
            equal = (scores[row] == edge).nonzero()[:, 0][: k - len(above)]
            places[row, :k] = torch.cat([above, equal])
        places = places[:, :k]
    places = places.sort(dim=1).values
    values = scores.gather(1, places)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)
