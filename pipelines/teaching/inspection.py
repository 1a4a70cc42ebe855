"""`itm inspect` of soft-label stores: their figures, what is not whole, and the page with the nearest neighbours."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from itm.data import files
from itm.data.manifest import Manifest
from itm.data.shards import index_shard, read_manifest, read_range
from itm.data.sidecar import Store, open_store
from itm.report.stores import Shown, render_stores
from itm.report.thumbnails import data_uri
from itm.teachers.inspection import Figures, Place, as_text, inspect_stores

PAGE = "neighbours.html"


@dataclass(frozen=True)
class Inspected:
    """left_out: folder of a store that is not whole or of other shards -> why; note: what was not measured, and why; page: HTML text."""

    figures: list[Figures]
    left_out: dict[str, str]
    note: str
    page: str

    @property
    def healthy(self) -> bool:
        return not self.left_out and not any(f.constant for f in self.figures)

    def text(self) -> str:
        out = [f"  left out: {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join([*([as_text(self.figures)] if self.figures else []), *out, *([f"  {self.note}"] if self.note else [])])


@dataclass
class Samples:
    """What the shards hold of a few samples, read by byte range, each once."""

    split_uri: str
    indexes: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    read: dict[Place, Shown] = field(default_factory=dict)
    images: dict[Place, bytes | None] = field(default_factory=dict)

    def get(self, place: Place) -> Shown:
        """Without the thumbnail."""
        if place not in self.read:
            shard, key = place
            uri = files.join(self.split_uri, shard)
            if shard not in self.indexes:
                self.indexes[shard] = {entry.key: (entry.start, entry.end) for entry in index_shard(uri)}
            sample = read_range(uri, *self.indexes[shard][key])
            self.read[place], self.images[place] = Shown("", {c.id: c.text for c in sample.captions}), sample.image
        return self.read[place]

    def words(self, places: Sequence[Place]) -> list[str]:
        """All captions of each sample as one text."""
        return [" ".join(self.get(place).captions.values()) for place in places]

    def shown(self, figures: Sequence[Figures]) -> dict[Place, Shown]:
        """What a page shows: thumbnails of what stands as an image on it, captions of all."""
        found: dict[Place, Shown] = {}
        for f in figures:
            for row in (row for asked in f.neighbours for row in (asked.query, *asked.found)):
                shown = found.get(row.place) or self.get(row.place)
                image = self.images[row.place]
                if f.store.modality == "image" and image is not None and not shown.thumbnail:
                    shown = Shown(_thumbnail(image), shown.captions)
                found[row.place] = shown
        return found


def _thumbnail(image: bytes) -> str:
    try:
        return data_uri(image)
    except ValueError:  # its row may come from another way of decoding
        return ""


def holds_stores(uri: str) -> bool:
    """Whether a folder is a store, or has some: finished or not."""
    return _is_store(uri) or any(map(_is_store, files.list_folders(uri) if files.is_folder(uri) else []))


def _is_store(uri: str) -> bool:
    return files.exists(files.join(uri, "store.json")) or bool(files.is_folder(uri) and files.list_files(uri, ".arrow"))


def inspect(uri: str, split_uri: str | None = None, batch: int = 128, seed: int = 0) -> Inspected:
    """Look at the store at `uri`, or at all stores below it. split_uri: its shards; unset: two folders above, where stores lie by default.

    Raises ValueError when not one store can be looked at, or there are shards asked for and none there.
    """
    found = [uri] if _is_store(uri) else sorted(filter(_is_store, files.list_folders(uri)))
    shards = split_uri or _shards_above(found[0])
    manifest = read_manifest(shards) if shards else None
    stores, left_out = [], {}
    for folder in found:
        try:
            stores.append(_checked(folder, manifest))
        except ValueError as error:
            left_out[files.name_of(folder)] = str(error)
    if not stores:
        raise ValueError("\n".join(left_out.values()))
    samples = Samples(shards) if shards else None
    note = "" if samples else "the shards are not beside the stores: name them with --shards to see images and words"
    figures = inspect_stores(stores, batch, seed, samples.words if samples else None)
    title = f"Soft labels: {stores[0].teacher}" if len(stores) == 1 else f"{len(stores)} soft-label stores"
    shown = samples.shown(figures) if samples else {}
    return Inspected(figures, left_out, note, render_stores(title, figures, shown, receipt_of(stores), note))


def _checked(folder: str, manifest: Manifest | None) -> Store:
    store = open_store(folder)
    if manifest is not None:
        store.check((shard.name, shard.sha256) for shard in manifest.shards)
    return store


def _shards_above(store: str) -> str | None:
    split = files.absolute(store).rstrip("/").rsplit("/", 2)[0]
    return split if files.is_folder(split) and files.list_files(split, ".tar") else None


def receipt_of(stores: Sequence[Store]) -> str:
    """What a page was made from: it changes with the bytes of the receipts."""
    digest = hashlib.sha256()
    for store in stores:
        digest.update(files.read_bytes(files.join(store.uri, "store.json")))
    return digest.hexdigest()[:16]


def page_of(uri: str, split_uri: str) -> str:
    """The page of one store, in its folder; written where it is absent or older than the store. Returns its URI.

    Raises ValueError where no page can be made: fewer than two samples with a vector.
    """
    page = files.join(uri, PAGE)
    receipt = f'name="receipt" content="{receipt_of([open_store(uri)])}"'
    if not files.exists(page) or receipt.encode() not in files.read_bytes(page):
        files.write_atomic(page, inspect(uri, split_uri).page.encode())
    return page
