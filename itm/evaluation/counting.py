"""Ranks of the positives in a score matrix, counted: how many scores of its row go ahead of each.

The matrix is walked in blocks of the memory order that it has, so a turned matrix (captions in rows) is never turned back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

BLOCK_SCORES = 4 << 20
SORT_FROM = 64  # positives of one query from which sorting its row costs less than comparing it with each
LAYERS = 8  # positives of one query up to which a turned matrix is counted as it lies; more are counted in rows of a copy

Matrix = Tensor | np.ndarray


def ranks_in(scores: Matrix, query: Tensor, column: Tensor, counts: Tensor, tie: str) -> Tensor:
    """(P,) int64: ranks (top = 1) of the positives of every row of scores (Q,G), in rising order within their query.

    query, column (P,): the positives by query, then column; counts (Q,) a query.
    """
    if _turned(scores) and len(query) and int(counts.max()) <= LAYERS:
        return _rank_turned(scores.T, query, column, tie)
    ends = counts.cumsum(0).tolist()
    pieces = [torch.zeros(0, dtype=torch.int64)]
    for start, block in blocks(scores):
        first, last = ends[start - 1] if start else 0, ends[start + len(block) - 1]
        pieces.append(_rank_block(block, query[first:last] - start, column[first:last], tie))
    return torch.cat(pieces)


def blocks(scores: Matrix) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, block of rows, each whole in memory); a block of a row-major matrix, or of some of its columns in a row, is no copy."""
    rows = max(1, BLOCK_SCORES // max(1, scores.shape[1]))
    for start in range(0, scores.shape[0], rows):
        piece = scores[start : start + rows]
        block = piece.detach().cpu() if isinstance(piece, Tensor) else torch.from_numpy(np.array(piece))  # a mapped file may be read-only
        if block.dtype in (torch.float16, torch.bfloat16):
            block = block.float()
        if block.stride(0) < block.stride(1):  # a turned matrix: whole columns in a piece first, a plain transpose then
            block = block.T.contiguous().T
        yield start, (block if block.stride(1) == 1 else block.contiguous()).numpy()


def in_order(query: Tensor, own: Tensor, tie: str) -> Tensor:
    """The order (P,) that sorts positives, given by query and column, by query and then by rank: score first, equal scores by the rule."""
    order = torch.arange(len(query)).flip(0) if tie.startswith("official") else torch.arange(len(query))
    order = order[own[order].argsort(descending=True, stable=True)]
    return order[query[order].argsort(stable=True)]


def ranks_of(query: Tensor, own: Tensor, ahead: Tensor, tie: str) -> Tensor:
    """(P,) int64 ranks (top = 1) of positives `in_order`, from the scores ahead of each in its row, positives counted.

    ahead: scores not below its own (pessimistic), above it (optimistic), or put ahead of it by the rule.

    A rank is the number of negatives ahead plus the positive's own number among the positives of its query. `ahead` counts positives
    as well. In a run of positives of equal score, those counted reach to the last of the run (pessimistic: not below includes them all)
    or end before its first (optimistic: above includes none); taking their number away leaves the negatives.
    """
    number = torch.arange(len(query)) - torch.searchsorted(query, query) + 1  # 1, 2, ... within each query
    begins = torch.ones(len(query), dtype=torch.bool)  # a run of equal positives of one query
    begins[1:] = (query[1:] != query[:-1]) | (own[1:] != own[:-1])
    run = begins.cumsum(0) - 1
    if tie == "pessimistic":
        last_of_run = number[begins.roll(-1)][run]
        return ahead - last_of_run + number
    if tie == "optimistic":
        first_of_run = number[begins][run]
        return ahead - (first_of_run - 1) + number
    return ahead + 1


def _turned(scores: Matrix) -> bool:
    """Whether a row of scores lies across memory, and a column along it."""
    down, along = scores.stride() if isinstance(scores, Tensor) else scores.strides
    return down < along


def _rank_block(scores: np.ndarray, query: Tensor, column: Tensor, tie: str) -> Tensor:
    """(P,) int64: ranks (top = 1) of the positives of a block, in rising order within their query.

    All scores ahead are counted, positives too; k, its number among the positives, then stands for the hits that the rule puts ahead.
    """
    own = torch.from_numpy(scores[query.numpy(), column.numpy()])
    order = in_order(query, own, tie)
    query, column, own = query[order], column[order], own[order]
    if tie == "pessimistic":
        return ranks_of(query, own, _count(scores, query, own, "left"), tie)
    ahead = _count(scores, query, own, "right")
    if tie != "optimistic":
        for p in (_count(scores, query, own, "left") > ahead + 1).nonzero()[:, 0].tolist():
            same = scores[int(query[p])] == float(own[p])
            ahead[p] += int(np.count_nonzero(same[int(column[p]) + 1 :] if tie.startswith("official") else same[: int(column[p])]))
    return ranks_of(query, own, ahead, tie)


def _count(scores: np.ndarray, query: Tensor, own: Tensor, side: Literal["left", "right"]) -> Tensor:
    """(P,) int64: scores in the query's row above the positive's own (side right), or not below it (left). `query` is sorted."""
    counts = np.zeros(len(query), dtype=np.int64)
    compare = np.greater if side == "right" else np.greater_equal
    ends = torch.bincount(query, minlength=len(scores)).cumsum(0).tolist()
    values, first = own.tolist(), 0
    for row, last in zip(scores, ends, strict=True):
        if last - first > SORT_FROM:
            counts[first:last] = len(row) - np.searchsorted(np.sort(row), own[first:last].numpy(), side=side)
        else:
            counts[first:last] = [np.count_nonzero(compare(row, value)) for value in values[first:last]]
        first = last
    return torch.from_numpy(counts)


def _rank_turned(scores: Matrix, query: Tensor, column: Tensor, tie: str) -> Tensor:
    """(P,) int64: what `_rank_block` gives, where query q is column q of scores (G,Q), each of whose rows is read once, as it lies.

    A row is compared with the first positives of all queries at once, then with the second ones of those that have two, and so on.
    """
    own = torch.as_tensor(scores[column, query] if isinstance(scores, Tensor) else scores[column.numpy(), query.numpy()]).detach().cpu()
    own = own.float() if own.dtype in (torch.float16, torch.bfloat16) else own
    order = in_order(query, own, tie)
    query, column, own = query[order], column[order], own[order]
    number = torch.arange(len(query)) - torch.searchsorted(query, query)  # 0, 1, ... within each query
    layers = [(number == k).nonzero()[:, 0] for k in range(int(number.max()) + 1)]
    counting = [_Layer(query[rows], column[rows], own[rows], scores.shape[1]) for rows in layers]
    for start, block in blocks(scores):
        for place, row in enumerate(block, start):
            for layer in counting:
                layer.add(place, row, tie)
    ahead = torch.empty(len(query), dtype=torch.int64)
    for rows, layer in zip(layers, counting, strict=True):
        ahead[rows] = layer.counts
    return ranks_of(query, own, ahead, tie)


class _Layer:
    """Positives (C,) of as many queries, and how many scores of the rows that were added go ahead of each by the rule."""

    def __init__(self, query: Tensor, column: Tensor, own: Tensor, queries: int) -> None:
        self.chosen = slice(None) if len(query) == queries else query.numpy()
        self.column, self.own = column.numpy(), own.numpy()
        self.hit = np.empty(len(own), bool)
        self.few, self.many, self.added = np.zeros(len(own), np.uint8), np.zeros(len(own), np.int64), 0

    def add(self, place: int, row: np.ndarray, tie: str) -> None:
        row = row[self.chosen]
        (np.greater_equal if tie == "pessimistic" else np.greater)(row, self.own, out=self.hit)
        if tie not in ("pessimistic", "optimistic"):
            self.hit |= (row == self.own) & (place > self.column if tie.startswith("official") else place < self.column)
        self.few += self.hit.view(np.uint8)
        self.added += 1
        if self.added % 255 == 0:  # what a byte can count
            self.many += self.few
            self.few[:] = 0

    @property
    def counts(self) -> Tensor:
        return torch.from_numpy(self.many + self.few)
