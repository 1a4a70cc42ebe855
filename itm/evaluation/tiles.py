"""A store of scores on disk: all images x all captions in tiles, one .npy a tile, so that scoring can be spread, stopped and resumed.

    <root>/scores-<12 hex digits of the identity>/tile-00003-00001.npy      float32 (images, captions) of one tile
                                                  captions.npy              which caption each column is, in tile order (by length)
                                                  store.json                identity and grid, written last

A tile is computed by `score_tile` alone and appears under its name only when it is whole: after a kill the missing tiles are computed,
nothing else. Who runs the tiles is the caller's choice (`spread`): one after the other here, or tasks of a cluster.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itm.data import files
from itm.data.formats import check_format
from itm.evaluation.scoring import by_length, score_matrix, trim
from itm.progress import Progress
from itm.types import Encoded, Matcher, Options

FORMAT = 1
# Pairs a tile, so that a lost one costs seconds to minutes: one product a pair, attention a pair, a joint forward a pair.
PRODUCT_PAIRS, ATTENTION_PAIRS, FORWARD_PAIRS = 1 << 24, 1 << 18, 1 << 14

Job = tuple[Any, ...]
Spread = Callable[[Callable[..., Any], Iterable[Job]], Iterator[Any]]
Tile = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """images x captions cut into tiles of rows x columns; the last ones are smaller."""

    images: int
    captions: int
    rows: int
    columns: int

    @classmethod
    def of(cls, members: Sequence[Matcher], images: Encoded, captions: Encoded, rows: int | None = None) -> Grid:
        """Square tiles of the size that the costliest member asks for, or of `rows` images."""
        joint = any(member.joint for member in members)
        pairs = FORWARD_PAIRS if joint else PRODUCT_PAIRS if images.parts is None or captions.parts is None else ATTENTION_PAIRS
        side = int(pairs**0.5)
        return cls(len(images), len(captions), min(rows or side, len(images)), min(side, len(captions)))

    @property
    def tiles(self) -> list[Tile]:
        return list(itertools.product(range(-(-self.images // self.rows)), range(-(-self.captions // self.columns))))

    def span(self, tile: Tile) -> tuple[slice, slice]:
        """Image rows and places in the caption order that a tile covers."""
        (i, j), r, c = tile, self.rows, self.columns
        return slice(i * r, min((i + 1) * r, self.images)), slice(j * c, min((j + 1) * c, self.captions))

    def shape(self, tile: Tile) -> tuple[int, int]:
        rows, columns = self.span(tile)
        return rows.stop - rows.start, columns.stop - columns.start


@dataclass(frozen=True)
class TileStore:
    """A folder of tiles. order (T,) int64: the caption of each column place."""

    uri: str
    grid: Grid
    order: Tensor
    identity: Options

    @classmethod
    def create(cls, root: str, identity: Options, grid: Grid, captions: Encoded) -> TileStore:
        """The store of this identity and grid below `root`, new or as it was left.

        Raises ValueError when nothing can be written there, or when the folder holds scores of another identity.
        """
        store = cls(cls.uri_of(root, identity, grid), grid, by_length(captions), identity)
        files.check_writable(store.uri)
        files.remove_abandoned(store.uri)
        if files.exists(store._receipt):
            cls.open(store.uri, identity)
        held = files.join(store.uri, "captions.npy")
        if files.exists(held) and not np.array_equal(_load(held), store.order.numpy()):
            raise ValueError(f"{held} lists the captions in another order than this split and matcher do; delete {store.uri}")
        _save(held, store.order.numpy())
        return store

    @staticmethod
    def uri_of(root: str, identity: Options, grid: Grid) -> str:
        digest = hashlib.sha256(json.dumps([FORMAT, identity, asdict(grid)], sort_keys=True).encode()).hexdigest()[:12]
        return files.join(root, f"scores-{digest}")

    @classmethod
    def is_finished(cls, root: str, identity: Options, grid: Grid) -> bool:
        """Whether `create` would give a store that lacks nothing."""
        return files.exists(files.join(cls.uri_of(root, identity, grid), "store.json"))

    @classmethod
    def open(cls, uri: str, identity: Options | None = None) -> TileStore:
        """A finished store. Raises ValueError when it is unfinished, or its identity is not the expected one; NewerFormat."""
        receipt = files.join(uri, "store.json")
        if not files.exists(receipt):
            raise ValueError(f"{uri} has no store.json: scoring was not finished; run the same command again to complete it")
        try:
            held: Options = json.loads(files.read_bytes(receipt))
            check_format(receipt, held, FORMAT)
            grid, found = Grid(**held["grid"]), dict(held["identity"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{receipt} is no receipt of a score store ({error!r}); delete the folder and score again") from None
        differing = [key for key in {**found, **(identity or found)} if found.get(key) != (identity or found).get(key)]
        if differing:
            wanted = ", ".join(f"{key} {found.get(key)!r}, wanted {(identity or found).get(key)!r}" for key in sorted(differing))
            raise ValueError(f"{receipt} belongs to other scores ({wanted}); delete the folder or choose another output")
        return cls(uri, grid, torch.from_numpy(_load(files.join(uri, "captions.npy"))), found)

    @property
    def _receipt(self) -> str:
        return files.join(self.uri, "store.json")

    def tile_uri(self, tile: Tile) -> str:
        return files.join(self.uri, f"tile-{tile[0]:05d}-{tile[1]:05d}.npy")

    def missing(self) -> list[Tile]:
        """Tiles that are not there, or not of their size."""
        held = files.sizes(self.uri, ".npy")
        return [tile for tile in self.grid.tiles if held.get(files.name_of(self.tile_uri(tile))) != _file_bytes(self.grid.shape(tile))]

    def finish(self) -> None:
        receipt = {"format": FORMAT, "identity": self.identity, "grid": asdict(self.grid), "tiles": len(self.grid.tiles)}
        files.write_atomic(self._receipt, json.dumps(receipt, indent=1).encode())


@dataclass(frozen=True)
class Part:
    """Rows to be scored into a store of their own: (images, captions) of each member; names: image keys and caption ids, for errors."""

    store: TileStore
    encoded: Sequence[tuple[Encoded, Encoded]]
    names: tuple[Sequence[str], Sequence[str]]

    def refuse(self, tile: Tile, bad: tuple[int, int, int]) -> ValueError:
        rows, columns = self.store.grid.span(tile)
        image, caption = self.names[0][rows.start + bad[1]], self.names[1][int(self.store.order[columns.start + bad[2]])]
        return ValueError(f"{bad[0]} scores of {self.store.tile_uri(tile)} are NaN, the first at image {image!r}, caption {caption!r}")


def fill(
    store: TileStore,
    members: Sequence[Matcher],
    encoded: Sequence[tuple[Encoded, Encoded]],
    names: tuple[Sequence[str], Sequence[str]],
    spread: Spread = itertools.starmap,
    put: Callable[[Any], Any] = lambda value: value,
    options: Options | None = None,
) -> None:
    """`fill_parts` of one part."""
    fill_parts([Part(store, encoded, names)], members, spread, put, options)


def fill_parts(
    parts: Sequence[Part],
    members: Sequence[Matcher],
    spread: Spread = itertools.starmap,
    put: Callable[[Any], Any] = lambda value: value,
    options: Options | None = None,
) -> None:
    """Compute the tiles that are missing, telling how far they are, and write the receipts.

    put: stores a value once for all jobs and returns what stands for it in their arguments; `spread` gives the workers the value.
    options: some of `score_matrix`. Raises ValueError naming the first NaN.
    """
    todo = [(part, part.store.missing()) for part in parts]
    pairs = sum(part.store.grid.images * part.store.grid.captions for part in parts)
    left = sum(math.prod(part.store.grid.shape(tile)) for part, tiles in todo for tile in tiles)
    shared = put(list(members))
    jobs = (
        (part.store.tile_uri(tile), shared, *blocks, options or {})
        for part, tiles in todo
        for tile, blocks in _blocks(part.store, tiles, part.encoded, put)
    )
    with Progress("score", pairs, "pair", initial=pairs - left) as progress:
        for (part, tile), bad in zip(((part, tile) for part, tiles in todo for tile in tiles), spread(score_tile, jobs), strict=True):
            if bad is not None:
                raise part.refuse(tile, bad)
            progress.update(math.prod(part.store.grid.shape(tile)))
    for part in parts:
        part.store.finish()


def score_tile(
    uri: str, members: Sequence[Matcher], images: list[Encoded], captions: list[Encoded], options: Options
) -> tuple[int, int, int] | None:
    """Score one tile into the file `uri`; or write nothing and return (how many, row, column of the first) when scores are NaN."""
    scores = score_matrix(list(members), images, captions, **options)
    bad = scores.isnan()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        return int(bad.sum()), row, column
    _save(uri, scores.numpy())
    return None


def read_tile(uri: str) -> np.ndarray:
    """(rows, columns) float32, mapped when the file is local."""
    return _load(uri)


def _blocks(store: TileStore, todo: Iterable[Tile], encoded: Sequence[tuple[Encoded, Encoded]], put: Any) -> Iterator[tuple[Tile, Any]]:
    """Each tile with handles of the image block and its caption block; an image block lives as long as its row of tiles."""
    held: dict[int, object] = {}
    row, block = -1, None
    for i, j in todo:
        rows, columns = store.grid.span((i, j))
        if i != row:
            row, block = i, put([images[rows] for images, _ in encoded])
        if j not in held:
            held[j] = put([trim(captions[store.order[columns]]) for _, captions in encoded])
        yield (i, j), (block, held[j])


def _save(uri: str, values: np.ndarray) -> None:
    with files.atomic_stream(uri) as stream:
        np.lib.format.write_array(stream, values, allow_pickle=False)


def _load(uri: str) -> np.ndarray:
    if files.is_remote(uri):
        return np.load(io.BytesIO(files.read_bytes(uri)), allow_pickle=False)
    return np.load(files.absolute(uri), mmap_mode="c", allow_pickle=False)


@functools.cache
def _file_bytes(shape: tuple[int, int]) -> int:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.tell() + 4 * math.prod(shape)
