"""A finished index on disk, checked against the matcher and the shards that it is searched with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from itm.data import files
from itm.data.formats import Json
from itm.data.manifest import NAME, full_key
from itm.data.shards import read_manifest
from itm.evaluation.dataset import Names
from itm.retrieval.kept import matcher_identity
from itm.retrieval.sides import Identity
from itm.retrieval.store import Catalogue, Entry, SplitEntry, captions_uri, read_catalogue, read_rows
from itm.retrieval.stored import Cells, Stored
from itm.types import Matcher

META = "meta:"


@dataclass(frozen=True)
class Loaded:
    """The parts of an index. image_numbers (I,) int64: equal for rows that show one image, before copies were put together.

    places: the file of images of each shard, in the order of the rows; removed (I,) bool: images that are not to be found by any key.
    """

    identity: Identity
    names: Names
    sides: tuple[Stored, Stored]
    columns: dict[str, Any]
    live: Tensor
    image_numbers: Tensor
    settings: Json
    places: list[str]
    removed: Tensor


def load(uri: str, matcher: Matcher | None) -> Loaded:
    """Raises ValueError for a half-built index, one of another matcher, and one of shards that have changed, naming both."""
    catalogue = read_catalogue(uri)
    choices = catalogue.choices
    if matcher is not None and (own := matcher_identity(matcher)) != choices.matcher:
        raise ValueError(
            f"{uri} was made by another matcher: a {catalogue.kind} of identity {choices.matcher}, and this {matcher.kind} is {own}; "
            "search with that one, or run `itm index` with this one and another --output"
        )
    entries: list[tuple[SplitEntry, str, Entry]] = []
    for split in catalogue.splits:
        place = place_of(uri, split.uri)
        _check_unchanged(uri, place, split)
        entries += [(split, place, entry) for entry in split.shards if not entry.gone]
    return _assembled(uri, catalogue, entries)


def place_of(index: str, split: str) -> str:
    """Where a split lies: its URI, or that of a folder around the index (`..`), so that both can move together."""
    if not split.startswith(".."):
        return split
    parts = files.absolute(index).rstrip("/").split("/")
    return "/".join(parts[: -len(split.split("/"))])


def written_place(index: str, split: str) -> str:
    """The other way round: as `index.json` names a split."""
    inside, around = files.absolute(index).rstrip("/"), files.absolute(split).rstrip("/")
    return "/".join([".."] * inside[len(around) :].count("/")) if inside.startswith(around + "/") else around


def _check_unchanged(uri: str, place: str, split: SplitEntry) -> None:
    """The shards are those that were indexed. A split that is not there can be searched, though its pictures cannot be shown."""
    remedy = "run `itm index --add`"
    here = [entry for entry in split.shards if not entry.gone]
    if files.exists(files.join(place, NAME)):
        now = {shard.name: shard.sha256[:12] for shard in read_manifest(place).shards}
        was = {entry.name: entry.sha256[:12] for entry in here}
    else:
        now = {name: str(size) for name, size in files.sizes(place, ".tar").items()}
        was = {entry.name: str(entry.bytes) for entry in here}
        if not now:
            return
    for name, said in was.items():
        if now.get(name) != said:
            found = f"is {now[name]} now" if name in now else "is not there now"
            raise ValueError(f"{place} has changed since the index {uri} was made: {name} was {said}, and {found}: {remedy}")
    if more := len(now.keys() - was.keys()):
        print(f"{more} shards of {place} are not in the index {uri}: {remedy}")


def _assembled(uri: str, catalogue: Catalogue, entries: Sequence[tuple[SplitEntry, str, Entry]]) -> Loaded:
    places = [files.join(uri, split.folder, f"{entry.stem}.arrow") for split, _, entry in entries]
    images = [read_rows(place) for place in places]
    captions = [read_rows(captions_uri(place)) for place in places]
    for place, table, (_, _, entry) in zip(places, images, entries, strict=True):
        if len(table) != entry.images:
            raise ValueError(f"{place} holds {len(table)} images, index.json says {entry.images}: run `itm index` again")
    counts = [len(table) for table in images]
    shards = [files.join(place, entry.name) for _, place, entry in entries]
    numbers = torch.from_numpy(_joined(images, "image").to_numpy().astype(np.int64))
    first, owner = _copies(numbers)
    removed = _removed(images, [entry for _, _, entry in entries], numbers)
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    described = [torch.from_numpy(t["image"].to_numpy().astype(np.int64)) + s for t, s in zip(captions, starts, strict=False)]
    names = Names(
        image_keys=_apart(_joined(images, "key"), shards, counts),
        caption_ids=_apart(_joined(captions, "id"), shards, [len(table) for table in captions]),
        caption_image=owner[torch.cat(described)],
        texts=cast(Any, Cells(_joined(captions, "text"))),
        image_shards=cast(Any, Cells(_repeated(shards, counts))),
    )
    columns = {
        "key": names.image_keys.column if isinstance(names.image_keys, Cells) else pa.chunked_array([pa.array(names.image_keys)]),
        "shard": _repeated([entry.name for _, _, entry in entries], counts),
        "split": _repeated([split.folder for split, _, _ in entries], counts),
    }
    identity = Identity(catalogue.choices.matcher, {place_of(uri, s.uri): s.fingerprint for s in catalogue.splits})
    sides = Stored(images), Stored(captions)
    return Loaded(identity, names, sides, _fields(images) | columns, first & ~removed, numbers, catalogue.settings, places, removed)


def _copies(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row whether it is the first that shows its image, and which row that is."""
    _, firsts, which = np.unique(numbers.numpy(), return_index=True, return_inverse=True)
    owner = torch.from_numpy(firsts[which])
    return owner == torch.arange(len(numbers)), owner


def _removed(tables: Sequence[pa.Table], entries: Sequence[Entry], numbers: Tensor) -> Tensor:
    """(I,) bool: rows that show an image that was removed by a key."""
    if not any(entry.removed for entry in entries):
        return torch.zeros(len(numbers), dtype=torch.bool)
    rows = [key in entry.removed for table, entry in zip(tables, entries, strict=True) for key in table["key"].to_pylist()]
    return torch.isin(numbers, numbers[torch.tensor(rows)])


def _joined(tables: Sequence[pa.Table], name: str) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for table in tables for chunk in table[name].chunks], type=tables[0][name].type)


def _repeated(values: Sequence[str], counts: Sequence[int]) -> pa.ChunkedArray:
    """Each value so many times, as a dictionary column cast to text only where it is read."""
    numbers = pa.array(np.repeat(np.arange(len(values)), counts), pa.int32())
    return pa.chunked_array([pa.DictionaryArray.from_arrays(numbers, pa.array(list(values), pa.string()))])


def _apart(names: pa.ChunkedArray, shards: Sequence[str], counts: Sequence[int]) -> Any:
    """Names that several shards use get their shard in front, and their split where that is not enough."""
    if len(names.unique()) == len(names):
        return Cells(names)
    own = names.to_pylist()
    owners = [shard for shard, count in zip(shards, counts, strict=True) for _ in range(count)]
    for lengthened in (full_key, lambda shard, name: f"{files.name_of(shard.rpartition('/')[0])}/{full_key(shard, name)}"):
        used = Counter(own)
        own = [
            name if used[name] == 1 else lengthened(shard, plain) for name, shard, plain in zip(own, owners, names.to_pylist(), strict=True)
        ]
    return own


def _fields(tables: Sequence[pa.Table]) -> dict[str, Any]:
    """The metadata columns of all shards; null where a shard has none, text where shards disagree on the type."""
    names = dict.fromkeys(name for table in tables for name in table.column_names if name.startswith(META))
    found = {}
    for name in names:
        kinds = {table.schema.field(name).type for table in tables if name in table.column_names}
        kind = kinds.pop() if len(kinds) == 1 else pa.float64() if kinds == {pa.int64(), pa.float64()} else pa.string()
        pieces = [table[name].cast(kind) if name in table.column_names else pa.nulls(len(table), kind) for table in tables]
        chunks = [chunk for piece in pieces for chunk in (piece.chunks if isinstance(piece, pa.ChunkedArray) else [piece])]
        found[name.removeprefix(META)] = pa.chunked_array(chunks, type=kind)
    return found
