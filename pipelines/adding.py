"""What was added to a source since it was packed goes to new shards behind the old ones, which keep their bytes.

A split keeps the order it was packed in. Its old items are found in the source as it is now by their keys, else by the names of their files
(a key may be another one where a new photo has the same stem), and each must give the bytes that lie in its shard. `pack.json` then says
which items of the source are new, so that a packing that was stopped goes on without a second look at the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from itm.data import files
from itm.data.formats import Json
from itm.data.manifest import NAME, Manifest, Receipt, read_receipt
from itm.data.records import Problem, Record
from itm.data.shards import read_manifest, read_range, sample_bytes
from itm.data.sources.source import Source

_NAMED = 5  # of the items that stand in the way


@dataclass(frozen=True)
class Layout:
    """Whose items the shards of a split hold.

    kept: (made_from, number of shards) of the packings before the last one, in the order of their shards. added: the ranges of items of
    the source that the last one packs, None for all. renamed: key that the source gives an added item -> a key that is free.
    """

    kept: tuple[tuple[str, int], ...] = ()
    added: tuple[tuple[int, int], ...] | None = None
    renamed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, claim: Json) -> Layout:
        """As `pack.json` says it."""
        ranges = claim.get("added")
        added = None if ranges is None else tuple((int(start), int(stop)) for start, stop in ranges)
        return cls(tuple((str(m), int(n)) for m, n in claim.get("kept", [])), added, dict(claim.get("renamed", {})))

    def said(self) -> Json:
        """What `pack.json` says of it; nothing of a split that was packed at once."""
        return {"kept": self.kept, "added": self.added, "renamed": self.renamed} if self.kept else {}

    @property
    def first(self) -> int:
        """Number of the first shard that the last packing makes."""
        return sum(shards for _, shards in self.kept)

    def items(self, count: int) -> list[int]:
        """Which items of a source of `count` the last packing packs."""
        return list(range(count)) if self.added is None else [n for start, stop in self.added for n in range(start, stop)]

    def finished(self, manifest: Manifest | None, made_from: str) -> bool:
        """Whether a split with this manifest is packed; one that is being added to keeps the manifest of its old shards till the end."""
        return manifest is not None and (not self.kept or manifest.source.endswith(f" {made_from}"))

    def receipts(self, folder: str) -> list[Receipt]:
        """Of the shards of earlier packings. Raises ValueError naming one that is not as it was."""
        found: list[Receipt] = []
        for made_from in [made_from for made_from, shards in self.kept for _ in range(shards)]:
            uri = shard_uri(folder, len(found))
            receipt = read_receipt(uri)
            if receipt is None or receipt.made_from != made_from:
                raise ValueError(f"{uri} or its index is not as it was packed: copy both back, or --overwrite to pack all of it again")
            found.append(receipt)
        return found


def shard_uri(folder: str, number: int) -> str:
    return files.join(folder, f"{number:05d}.tar")


def added_since(before: Manifest | None, manifest: Manifest) -> str:
    """How many images a packing put behind those of an earlier one; empty where there was none, or nothing to do."""
    if before is None or before.shards == manifest.shards:
        return ""
    images = manifest.samples - before.samples
    new, old = len(manifest.shards) - len(before.shards), len(before.shards)
    return f"; {images:,} images added in {new:,} new shards, the {old:,} old shards are as they were"


def standing(folder: str) -> Manifest | None:
    """The manifest that a split has before it is packed."""
    try:
        return read_manifest(folder) if files.exists(files.join(folder, NAME)) else None
    except ValueError:
        return None


def layout_after(folder: str, held: Json | None, choices: Json, source: Source, as_packed: Callable[[Record], Record]) -> Layout:
    """How a folder that holds shards goes on with the source as it is now. held: what its pack.json says, choices: what it would say;
    as_packed: a record as a shard holds it.

    Raises ValueError where the shards are of others or of other choices, naming these, or items that are gone or changed.
    """
    remedy = "use another data.root, or --overwrite to delete and repack them"
    if held is None:
        raise ValueError(f"{folder} holds shards that this command did not make; {remedy}")
    names = {*choices, *held} - {"source", "format", "made_from", *Layout(kept=(("", 0),)).said()}
    if differing := [f"{n} was {held.get(n)!r}, is {choices.get(n)!r}" for n in sorted(names) if held.get(n) != choices.get(n)]:
        raise ValueError(f"{folder} holds shards made from other choices ({'; '.join(differing)}); {remedy}")
    if (manifest := standing(folder)) is None:
        raise ValueError(f"{folder} holds shards made from other choices (source, options or data files), and not all of them; {remedy}")
    source.regions_dtype = str(choices.get("regions_dtype", "fp16"))
    old = _Old(source, str(choices["split"]), as_packed)
    kept = _whole(folder, held, manifest)
    for n, receipt in enumerate(Layout(kept).receipts(folder)):
        old.find(shard_uri(folder, n), receipt)
        if len(old.lost) >= _NAMED:
            break
    if old.lost:
        more = " and perhaps others" if len(old.lost) >= _NAMED else ""
        raise ValueError(
            f"{folder} holds shards of items that are not in the source as they were packed: {'; '.join(old.lost[:_NAMED])}{more}. "
            f"Items may be added to a packed split, not taken away or changed; {remedy}"
        )
    return Layout(kept, *old.rest())


def _whole(folder: str, held: Json, manifest: Manifest) -> tuple[tuple[str, int], ...]:
    """The packings that this manifest is of, as `Layout.kept`. Raises ValueError when the indexes do not say what it says."""
    before, made_from = Layout.of(held), str(held["made_from"])
    kept = before.kept
    if before.finished(manifest, made_from):
        here = 0
        while (receipt := read_receipt(shard_uri(folder, before.first + here))) is not None and receipt.made_from == made_from:
            here += 1
        kept = (*kept, (made_from, here)) if here else kept
    receipts = Layout(kept).receipts(folder)
    if (sum(r.info.samples for r in receipts), sum(r.rejected for r in receipts)) != (manifest.samples, manifest.rejected):
        raise ValueError(f"{folder}: its indexes do not say what its manifest says: copy it again, or --overwrite to pack all of it again")
    return kept


class _Old:
    """The old items of a split, looked up in the source shard by shard. lost: what is to be said about those that are not as they were."""

    def __init__(self, source: Source, split: str, as_packed: Callable[[Record], Record]) -> None:
        self.source, self.split, self.as_packed = source, split, as_packed
        self.lost: list[str] = []
        self.keys: list[str] = []
        self.names: dict[str, int] = {}
        self.numbers: dict[str, list[int]] = {}
        for number, about in enumerate(source.abouts(split)):
            self.keys.append(str(about["key"]))
            self.numbers.setdefault(self.keys[-1], []).append(number)
            if about.get("filename"):
                self.names.setdefault(str(about["filename"]), number)
        self.taken: set[int] = set()
        self.used: set[str] = set()

    def find(self, uri: str, receipt: Receipt) -> None:
        """Look for the items of a shard, those that were packed and those that were rejected."""
        spans = {key: (start, end) for key, _, start, end in receipt.rows}
        rejected = {p.key: p for p in receipt.problems if p.what == "sample"}
        self.used |= spans.keys() | rejected.keys()
        known = [key for key in spans if key in self.numbers]
        others = [key for key in spans if key not in self.numbers]
        numbers = [self.numbers[key][0] for key in known]
        with files.open_file(uri) as shard:
            for key, number, item in zip(known, numbers, self._items(numbers), strict=True):
                start, end = spans[key]
                if self._same(item, shard.read_at(end - start, start)):
                    self.taken.add(number)
                else:
                    others.append(key)
        for key in others:
            self._find_by_name(uri, key, *spans[key])
        for problem in rejected.values():
            self._find_rejected(problem)

    def rest(self) -> tuple[tuple[tuple[int, int], ...], dict[str, str]]:
        """Ranges of the items that are new, and the keys of those whose own is taken."""
        added = [number for number in range(len(self.keys)) if number not in self.taken]
        renamed: dict[str, str] = {}
        for key in dict.fromkeys(self.keys[number] for number in added if self.keys[number] in self.used):
            n = 2
            while (free := f"{key}-{n}") in self.used or free in self.numbers:
                n += 1
            renamed[key] = free
            self.used.add(free)
        return tuple(ranges(added)), renamed

    def _items(self, numbers: Iterable[int]) -> Iterator[Record | Problem]:
        return self.source.at(self.split, [self.source.places(self.split, number, number + 1)[0] for number in numbers])

    def _same(self, item: Record | Problem, packed: bytes) -> bool:
        if isinstance(item, Problem):
            return False
        try:
            return sample_bytes(self.as_packed(item)) == packed
        except ValueError:
            return False

    def _find_by_name(self, uri: str, key: str, start: int, end: int) -> None:
        name = read_range(uri, start, end).meta.get("filename")
        number = self.names.get(str(name)) if name else next(iter(self.numbers.get(key, [])), None)
        if number is None:
            self.lost.append(f"{name or key} is gone")
            return
        item = rekeyed(next(self._items([number])), key)
        if self._same(item, files.read_span(uri, start, end)):
            self.taken.add(number)
        else:
            self.lost.append(f"{name or key} {f'cannot be used: {item.reason}' if isinstance(item, Problem) else 'is changed'}")

    def _find_rejected(self, problem: Problem) -> None:
        """What was rejected stays so: its file may not have been mended since."""
        number = next((n for n in self.numbers.get(problem.key, []) if n not in self.taken), None)
        if number is None:
            self.lost.append(f"{problem.key}, which was rejected, is gone")
            return
        self.taken.add(number)
        item = next(self._items([number]))
        if problem.stage == "source" and isinstance(item, Record):
            self.lost.append(f"{problem.key}, which was rejected, can be read now")


def rekeyed(item: Record | Problem, key: str) -> Record | Problem:
    """An item under another key, with what a source derives from a key: its image_id and the ids of captions without one."""
    if isinstance(item, Problem) or item.key == key:
        return replace(item, key=key)
    own = f"{item.key}#"
    captions = [replace(c, id=f"{key}#{c.id.removeprefix(own)}") if c.id.startswith(own) else c for c in item.captions]
    meta = item.meta | ({"image_id": key} if item.meta.get("image_id") == item.key else {})
    return replace(item, key=key, captions=captions, meta=meta)


def ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as [start, stop)."""
    start = 0
    for n in range(1, len(numbers) + 1):
        if n == len(numbers) or numbers[n] != numbers[n - 1] + 1:
            yield numbers[start], numbers[n - 1] + 1
            start = n
