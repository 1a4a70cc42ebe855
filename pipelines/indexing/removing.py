"""Images that an index is not to find any more, by their keys, though their shards still have them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from itm.data import files
from itm.retrieval.index import Index
from itm.retrieval.store import Catalogue, Entry, captions_uri, read_catalogue, read_rows, write_catalogue
from itm.types import Matcher


def remove(uri: str, matcher: Matcher, keys: str) -> Catalogue:
    """Note the keys in the file `keys`, one a line, in the index at `uri`; what is noted already stays noted.

    Vectors and row numbers stay as they are, so a first stage and structures of faiss go on serving. Raises ValueError naming the first key
    that the index does not have, before anything is noted; and as `Index.open`.
    """
    index, catalogue = Index.open(uri, matcher), read_catalogue(uri)
    rows = _rows(index, keys)
    tables = [read_rows(place) for place in index.places]
    starts = torch.tensor([0, *(len(table) for table in tables)]).cumsum(0)
    found: dict[str, dict[str, int]] = {}
    for number in (torch.searchsorted(starts, rows, right=True) - 1).unique().tolist():
        own = rows[(rows >= starts[number]) & (rows < starts[number + 1])] - starts[number]
        counts = Counter(read_rows(captions_uri(index.places[number]))["image"].to_pylist())
        found[index.places[number]] = {tables[number]["key"][row].as_py(): counts[row] for row in own.tolist()}
    for split in catalogue.splits:
        for place, entry in enumerate(split.shards):
            more = found.get(files.join(uri, split.folder, f"{entry.stem}.arrow"), {})
            split.shards[place] = entry if entry.gone else replace(entry, removed={**entry.removed, **more})
    write_catalogue(uri, catalogue)
    return catalogue


def still_removed(folder: str, now: Entry, before: Entry | None) -> Entry:
    """A shard's entry with the keys that were removed from it before, and that it still has."""
    if before is None or not before.removed:
        return now
    there = (
        set(read_rows(files.join(folder, f"{now.stem}.arrow"))["key"].to_pylist()) if now.sha256 != before.sha256 else set(before.removed)
    )
    return replace(now, removed={key: count for key, count in before.removed.items() if key in there})


def _rows(index: Index, keys: str) -> torch.Tensor:
    """The rows of the keys in a file. Raises ValueError for no file, one without keys, and for keys that the index does not have."""
    if not files.exists(keys):
        raise ValueError(f"--remove {keys}: there is no such file; it holds one key a line, as `itm search` shows them")
    named = list(dict.fromkeys(line.strip() for line in files.read_bytes(keys).decode().splitlines() if line.strip()))
    if not named:
        raise ValueError(f"{keys} names no image: it holds one key a line, as `itm search` shows them")
    row_of = {key: row for row, key in enumerate(index.names.image_keys)}
    unknown = [key for key in named if key not in row_of]
    if unknown:
        count = f"{len(unknown)} of {len(named)} keys are unknown"
        raise ValueError(f"{keys}: the index {index.uri} holds no image {unknown[0]!r} ({count}); keys look like {next(iter(row_of))!r}")
    return torch.tensor([row_of[key] for key in named])
