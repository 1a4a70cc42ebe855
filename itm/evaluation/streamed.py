"""Ranks from a store of tiles, tile by tile: the (I,T) matrix is never held, and the result is that of the dense matrix, ties included.

Two walks over the tiles: the first takes the score of every positive out of the tile where its rivals lie (a score computed again by
another expression would differ by rounding and move ranks), the second counts in each tile how many scores go ahead of each positive of
its rows. Counts of tiles add up, so tiles may be counted anywhere, in any order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from itm.evaluation.counting import in_order, ranks_of
from itm.evaluation.metrics import Positives, Ranking, Streamed, pairs_of, ranking_of
from itm.evaluation.tiles import Job, Spread, Tile, TileStore, read_tile


class TiledScores(Streamed):
    """The scores of a store, images in rows; `.T` has captions in rows. `scores[rows]` reads dense rows, `rank` streams.

    Numbers of images and captions are those of the split. A *place* is where one lies in the store, whose captions are sorted by length.
    """

    def __init__(self, store: TileStore, spread: Spread = itertools.starmap, turned: bool = False) -> None:
        self.store, self.spread, self.turned = store, spread, turned
        grid = store.grid
        at_place = torch.arange(grid.images), store.order  # the image, and the caption, at each place
        self._gallery = at_place[not turned]  # the number of the column at each place
        self._places = at_place[turned].argsort()  # the place of each row
        self._gallery_places = self._gallery.argsort()  # the place of each column
        self.shape = (grid.captions, grid.images) if turned else (grid.images, grid.captions)
        self._steps = (grid.columns, grid.rows) if turned else (grid.rows, grid.columns)  # rows and columns of a tile, as turned

    @property
    def T(self) -> TiledScores:
        return TiledScores(self.store, self.spread, not self.turned)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Dense rows (n, gallery)."""
        places = self._places[rows]
        dense = torch.empty(len(places), self.shape[1])
        for block in torch.unique(places // self._steps[0]).tolist():
            chosen = (places // self._steps[0] == block).nonzero()[:, 0]
            local = places[chosen] - block * self._steps[0]
            for tile, columns in self._tiles(block):
                dense[chosen[:, None], self._gallery[columns]] = torch.from_numpy(_oriented(self.store.tile_uri(tile), self.turned)[local])
        return dense

    def rank(self, positives: Positives, tie: str, absent: Tensor | None = None) -> Ranking:
        """What `rank_queries` gives on the dense matrix."""
        query, column = pairs_of(positives)
        own = self._own(query, column)
        order = in_order(query, own, tie)
        query, column, own = query[order], column[order], own[order]
        rank = ranks_of(query, own, self._ahead(query, column, own, tie), tie)
        return ranking_of(query, rank, torch.bincount(query, minlength=self.shape[0]), 0 if absent is None else absent, self.shape[1])

    def _tiles(self, block: int) -> Iterator[tuple[Tile, slice]]:
        """The tiles of the `block`-th stripe of rows, each with the places of the columns that it covers."""
        step = self._steps[1]
        for other in range(-(-self.shape[1] // step)):
            yield (other, block) if self.turned else (block, other), slice(other * step, min((other + 1) * step, self.shape[1]))

    def _own(self, query: Tensor, column: Tensor) -> Tensor:
        """(P,) float32: the score of each pair of row and column. Each tile that holds some of them is read once."""
        row, place = self._places[query], self._gallery_places[column]
        across = -(-self.shape[1] // self._steps[1])
        number = row // self._steps[0] * across + place // self._steps[1]  # of the tile that holds the pair
        order = number.argsort(stable=True)
        tiles, counts = torch.unique_consecutive(number[order], return_counts=True)
        parts = order.split(counts.tolist())

        def jobs() -> Iterator[Job]:
            for tile, part in zip(tiles.tolist(), parts, strict=True):
                i, j = divmod(tile, across)
                local = (row[part] - i * self._steps[0]).numpy(), (place[part] - j * self._steps[1]).numpy()
                yield self.store.tile_uri((j, i) if self.turned else (i, j)), self.turned, *local

        own = torch.empty(len(query))
        for part, values in zip(parts, self.spread(_pick, jobs()), strict=True):
            own[part] = torch.tensor(values)
        return own

    def _ahead(self, query: Tensor, column: Tensor, own: Tensor, tie: str) -> Tensor:
        """(P,) int64: scores of the whole row ahead of each positive, other positives included; a sum over the tiles of its stripe."""
        order = self._places[query].argsort(stable=True)
        row, column, own = self._places[query][order], column[order], own[order]
        starts = torch.arange(0, self.shape[0] + self._steps[0], self._steps[0])
        bounds = torch.searchsorted(row, starts).tolist()
        work = [
            (block, slice(a, b), *tile) for block, (a, b) in enumerate(itertools.pairwise(bounds)) if a < b for tile in self._tiles(block)
        ]

        def jobs() -> Iterator[Job]:
            for block, part, tile, columns in work:
                asked = (row[part] - block * self._steps[0]).numpy(), column[part].numpy(), own[part].numpy()
                yield self.store.tile_uri(tile), self.turned, asked, self._gallery[columns].numpy(), tie

        ahead = torch.zeros(len(query), dtype=torch.int64)
        for (_, part, _, _), counts in zip(work, self.spread(_count, jobs()), strict=True):
            ahead[order[part]] += torch.tensor(counts)
        return ahead


def _oriented(uri: str, turned: bool) -> np.ndarray:
    values = read_tile(uri)
    return values.T if turned else values


def _pick(uri: str, turned: bool, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.array(_oriented(uri, turned)[rows, columns])


def _count(uri: str, turned: bool, asked: tuple[np.ndarray, np.ndarray, np.ndarray], gallery: np.ndarray, tie: str) -> np.ndarray:
    """(P,) int64: scores of the tile ahead of each asked pair (local row ascending, column, own score); gallery = columns of the tile.

    pessimistic counts s >= own, optimistic s > own, the others s > own and equal scores of the columns that the rule puts first.
    """
    tile = np.ascontiguousarray(_oriented(uri, turned))
    rows, columns, own = asked
    ranked = torch.from_numpy(np.sort(tile, axis=1))
    counts = np.bincount(rows, minlength=len(tile))
    inside = np.arange(len(rows)) - (counts.cumsum() - counts)[rows]
    wanted = torch.zeros(len(tile), int(counts.max()))
    wanted[rows, inside] = torch.tensor(own)

    def above(equal_too: bool) -> np.ndarray:
        return tile.shape[1] - torch.searchsorted(ranked, wanted, right=not equal_too).numpy()[rows, inside]

    if tie in ("pessimistic", "optimistic"):
        return above(tie == "pessimistic")
    ahead = above(False)
    tied = (above(True) > ahead).nonzero()[0]
    for part in np.array_split(tied, max(1, len(tied) // 1024)):
        first = gallery < columns[part, None] if tie == "lower_index" else gallery > columns[part, None]
        ahead[part] += ((tile[rows[part]] == own[part, None]) & first).sum(1)
    return ahead
