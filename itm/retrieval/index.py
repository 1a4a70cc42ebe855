"""What is searched: the encoded images and captions of shards, their names, and the columns that answers can be filtered by.

`Index.open` opens what `itm index` wrote; `Index.of_shards` encodes a split in memory, as a search without an index does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from itm.data import files
from itm.data.formats import Json
from itm.data.manifest import full_key
from itm.data.shards import Sample, index_shard, read_manifest, read_range
from itm.evaluation.dataset import EncodedSplit, Names
from itm.retrieval.filters import chosen
from itm.retrieval.kept import load_split, matcher_identity
from itm.retrieval.loading import load
from itm.retrieval.sides import Find, Held, Identity, Side
from itm.retrieval.store import NAME, read_catalogue
from itm.types import Matcher


class Index:
    """Rows are numbered as they were indexed; `names` and both sides have all of them, `rows` says which can be found.

    columns: a column for each image row, by name; the key, the shard and the split are always there.
    """

    def __init__(self, identity: Identity, names: Names, sides: tuple[Side, Side], columns: Mapping[str, Any], live: Tensor | None) -> None:
        self.identity, self.names, self.columns = identity, names, dict(columns)
        self.images, self.captions = sides
        self.live = live
        """(I,) bool, False for images that are removed or shown by an earlier row; None where all can be found."""
        self.removed: Tensor | None = None
        """(I,) bool, of an index that was opened: images that were removed by a key."""
        self.settings: Json = {}
        self.uri = ""
        """Of an index that was opened."""
        self.places: Sequence[str] = ()
        """Of an index that was opened: the file of images of each shard, in the order of the rows."""
        self.image_numbers: Tensor | None = None
        """(I,) int64 of an index that was opened: equal for rows that show one image."""

    @classmethod
    def of_split(cls, split: EncodedSplit, identity: Identity) -> Index:
        """Of a split that was encoded in this process."""
        names = split.names
        columns = {
            "key": pa.array(names.image_keys, pa.string()),
            "shard": pa.array([files.name_of(shard) for shard in names.image_shards], pa.string()),
            "split": pa.array([files.name_of(shard.rpartition("/")[0]) for shard in names.image_shards], pa.string()),
        }
        return cls(identity, names, (Held(split.images), Held(split.captions)), columns, None)

    @classmethod
    def of_shards(cls, matcher: Matcher, shards: str, index: str | None = None, device: Any = "cpu", uni: bool = False) -> Index:
        """Of a folder of shards: encoded now, or read from what an earlier search kept below `index` (default <shards>/index).

        uni: the vectors of uni-modal heads are needed. Raises ValueError as `load_split`.
        """
        split = load_split(matcher, shards, index or files.join(shards, "index"), device, uni)
        return cls.of_split(split, Identity(matcher_identity(matcher), {shards: read_manifest(shards).fingerprint()}))

    @staticmethod
    def made(uri: str, matcher: Matcher) -> bool:
        """Whether a finished index of this matcher lies at `uri`. Raises NewerFormat; ValueError for a damaged one."""
        return files.exists(files.join(uri, NAME)) and read_catalogue(uri).choices.matcher == matcher_identity(matcher)

    @classmethod
    def open(cls, uri: str, matcher: Matcher | None = None) -> Index:
        """What `itm index` wrote to `uri`, local files memory-mapped.

        Raises ValueError, naming both, for an index of another matcher, or of shards that have changed; and for a half-built one.
        """
        found = load(uri, matcher)
        index = cls(found.identity, found.names, found.sides, found.columns, None if bool(found.live.all()) else found.live)
        index.settings, index.image_numbers, index.uri, index.places = found.settings, found.image_numbers, uri, found.places
        index.removed = found.removed
        return index

    def __len__(self) -> int:
        """Images that can be found."""
        return len(self.images) if self.live is None else int(self.live.sum())

    @property
    def place(self) -> str:
        """The splits, as a message names them."""
        return ", ".join(self.identity.data)

    def rows(self, find: Find, where: Mapping[str, Sequence[str]] | None = None) -> Tensor | None:
        """The rows (N,) int64, in order, of images or captions that can be found and pass the filters; None = all.

        Raises ValueError as `chosen`.
        """
        kept = self.live
        if where:
            passed = chosen(self.columns, where)
            kept = passed if kept is None else kept & passed
        if kept is None:
            return None
        return (kept if find == "images" else kept[self.names.caption_image]).nonzero()[:, 0]

    def metadata(self, row: int) -> dict[str, Any]:
        """The columns of an image beside its key, shard and split; those that it has."""
        cells = ((name, column[row].as_py()) for name, column in self.columns.items() if name not in ("key", "shard", "split"))
        return {name: value for name, value in cells if value is not None}

    def captions_of(self, image: int) -> list[int]:
        """The rows of an image's captions, in order."""
        order, starts = self._by_image
        return order[starts[image] : starts[image + 1]].tolist()

    @property
    def caption_count(self) -> int:
        """Captions that can be found."""
        rows = self.rows("captions")
        return len(self.captions) if rows is None else len(rows)

    def row_of(self, key: str) -> int:
        """The row of an image. Raises ValueError for a key that is not there, or was removed."""
        row = self._by_key.get(key)
        if row is None:
            first = next(iter(self._by_key), None)
            raise ValueError(f"the index holds no image {key!r}; keys look like {first!r}")
        if self.removed is not None and bool(self.removed[row]):
            raise ValueError(f"image {key!r} was removed from the index")
        return row

    def sample(self, key: str) -> Sample:
        """An image with its files, read from its shard. Raises ValueError for a key that is not there, or a shard that has changed."""
        return _sample(self.names.image_shards[self.row_of(key)], key)

    @cached_property
    def _by_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.names.image_keys)}

    @cached_property
    def _by_image(self) -> tuple[Tensor, Tensor]:
        owners = self.names.caption_image
        counts = torch.bincount(owners, minlength=len(self.images))
        return owners.argsort(stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _sample(shard: str, key: str) -> Sample:
    """key: as the index names it. Raises ValueError for a shard that is not there, or holds it no more."""
    if not files.exists(shard):
        raise ValueError(f"{shard}, which holds image {key!r}, is not there: put the shards back, or run `itm index` where they are")
    split = files.name_of(shard.rpartition("/")[0])
    entries = ((entry, full_key(shard, entry.key)) for entry in index_shard(shard))
    entry = next((entry for entry, full in entries if key in (entry.key, full, f"{split}/{full}")), None)
    if entry is None:
        raise ValueError(f"{shard} holds no sample {key!r} any more: run `itm index` again")
    return read_range(shard, entry.start, entry.end)
