"""Shards: WebDataset tars, one sample an image. Record -> tar members on the way in, tar members -> Sample on the way out.

Members of a sample: `<key>.jpg|png|webp` and/or `<key>.regions.npz`, and `<key>.json` (`image_id`, `captions: [{id, text}]`, `split`, ...).
`captions: []` says that there are none: such a sample can be taught by an image teacher and found by a search.
Read as they are, too: img2dataset (`jpg`, `txt`, `json`) and the CLIP_benchmark layout (`txt` with one caption a line).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from itm.data import files
from itm.data.captions import captions_of
from itm.data.formats import Json
from itm.data.manifest import (
    CHANGED,
    FOREIGN,
    NAME,
    Manifest,
    SampleIndex,
    ShardInfo,
    list_shards,
    parse_manifest,
    read_receipt,
    write_manifest,
)
from itm.data.member_names import CONTENT, REGIONS, cut_first, cut_last, dotted_keys
from itm.data.records import IMAGE_FORMATS, Caption, Problem, Record, Regions, image_format
from itm.data.tar import Member, TarProblem, members, plain_files

__all__ = [
    "Caption",
    "Manifest",
    "Problem",
    "Regions",
    "Sample",
    "SampleIndex",
    "ShardInfo",
    "copy_samples",
    "index_shard",
    "parse_range",
    "read_manifest",
    "read_range",
    "read_samples",
    "read_scattered",
    "sample_bytes",
    "scan_bytes",
    "scan_shard",
    "write_manifest",
    "write_shard",
]


@dataclass(frozen=True, eq=False)
class Sample:
    """One image as a shard holds it: encoded image bytes and/or npz bytes of its regions. meta = the json without captions.

    states_image: the json gives the `image_id` of meta; else that is the key.
    """

    key: str
    image: bytes | None
    regions: bytes | None
    captions: list[Caption]
    meta: Json
    states_image: bool = True


def write_shard(uri: str, records: Iterable[Record]) -> ShardInfo:
    """Write a tar (the same bytes for the same records); it appears under its name only when complete.

    A record without captions becomes a sample that says so (`"captions": []`): it can be searched, and is no training pair.
    Raises ValueError for a key that WebDataset would cut, and a sample without image and regions.
    """
    return _write(uri, ((_members_of(record), len(record.captions)) for record in records))


def copy_samples(
    uri: str, samples: Iterable[Sample], split: str, beside: Callable[[Sample], Mapping[str, bytes]] | None = None
) -> ShardInfo:
    """As `write_shard`, of samples read from other shards; image and region files stay as they are, byte for byte.

    beside: further members of a sample, by extension.
    """
    split_of = lambda s: s.meta.get("split") or split
    further = beside or (lambda _: {})
    rows = ((Record(s.key, split_of(s), s.captions, s.image, _format_of(s.image), meta=s.meta), s) for s in samples)
    return _write(uri, ((_members_of(record, s.regions) | dict(further(s)), len(s.captions)) for record, s in rows))


def _format_of(image: bytes | None) -> str:
    """The extension of image bytes by their first ones."""
    found = image_format(image or b"")
    return found if found in IMAGE_FORMATS else "jpg"


def _write(uri: str, rows: Iterable[tuple[Json, int]]) -> ShardInfo:
    """Tar of (members of a sample, its number of captions)."""
    samples = captions = 0
    with files.atomic_stream(uri) as stream:
        sink = _Hashing(stream)
        writer = _tar_writer(sink)
        for members_of_one, count in rows:
            writer.write(members_of_one)
            samples, captions = samples + 1, captions + count
        writer.close()
    return ShardInfo(name=files.name_of(uri), samples=samples, captions=captions, bytes=sink.bytes, sha256=sink.digest.hexdigest())


def _tar_writer(sink: object) -> Any:
    from webdataset.writer import TarWriter

    # An int mtime keeps the headers plain USTAR; the default float makes tarfile write 1 KiB of PAX header a member.
    return TarWriter(cast(BinaryIO, sink), encoder=False, mtime=0, user="root", group="root")


def sample_bytes(record: Record) -> bytes:
    """The bytes that a record takes in a shard: those of its row of the index. Raises ValueError as `write_shard`."""
    sink = io.BytesIO()
    _tar_writer(sink).write(_members_of(record))
    return sink.getvalue()


def read_samples(uri: str, sha256: str | None = None) -> Iterator[Sample | Problem]:
    """The samples of a shard in tar order; what cannot be used comes as a Problem in its place. Never raises for bad content.

    Raises ValueError when the shard has another sha256 than the one given (that of its manifest).
    """
    data = files.read_view(uri)
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"{uri} has sha256 {found[:12]}, its manifest says {sha256[:12]}: {CHANGED}")
    yield from _parse(data, files.name_of(uri))


def read_scattered(uri: str) -> Iterator[Sample | Problem]:
    """As `read_samples`, but the members of a sample are gathered wherever they lie in the tar; of two of one name the first counts."""
    tar, shard = files.read_view(uri), files.name_of(uri)
    groups, others, problems = _groups(tar, shard, fragment=False)
    gathered: dict[str, dict[str, Member]] = {}
    for key, parts in groups:
        held = gathered.setdefault(key, {})
        for number, e in enumerate(second := [e for e in parts if e in held]):
            lost = _count(tar, key, {name: parts[name] for name in second}) if number == 0 else 0
            problems.append(Problem(key, shard, "read", f"a second .{e} of this key; the first is kept", "member", lost))
        held |= {extension: member for extension, member in parts.items() if extension not in held}
    for key, parts in gathered.items():
        yield from _sample(shard, key, _content(tar, parts), others.get(key, []))
    yield from problems


def read_range(uri: str, start: int, end: int) -> Sample:
    """The sample in bytes [start, end), as `index_shard` gave them. Raises ValueError when the shard has changed since."""
    return parse_range(files.read_span(uri, start, end), uri, start)


def parse_range(data: bytes, uri: str, start: int) -> Sample:
    """As `read_range`, of bytes that were read from `start` on."""
    if (sample := _plain_sample(data, uri)) is not None:
        return sample
    for item in _parse(memoryview(data), files.name_of(uri), fragment=True):
        if isinstance(item, Sample):
            return item
        if item.what in ("sample", "shard"):
            break
    end = start + len(data)
    raise ValueError(f"{uri}: no usable sample in bytes {start}-{end}; the shard changed after it was indexed, read its manifest again")


def _plain_sample(data: bytes, uri: str) -> Sample | None:
    """The sample of bytes that hold nothing else, in members named as `write_shard` names them: a third of the time of `_parse`.

    None for what `_parse` has to judge.
    """
    held = plain_files(data)
    cut = [name.partition(".") for name in held or ()]
    if held is None or len({key for key, _, _ in cut}) != 1 or not cut[0][0] or not all(extension in CONTENT for _, _, extension in cut):
        return None
    content = {extension: value for (_, _, extension), value in zip(cut, held.values(), strict=True)}
    return next((item for item in _sample(files.name_of(uri), cut[0][0], content, []) if isinstance(item, Sample)), None)


def index_shard(uri: str, sha256: str | None = None) -> list[SampleIndex]:
    """Where each usable sample lies, in tar order: exactly the samples of `read_samples`. A packed shard is not read for it.

    Raises ValueError when the shard is known to have another sha256 than the one given (that of its manifest).
    """
    receipt = read_receipt(uri)
    if receipt is None:
        index, _, found = scan_shard(uri)
    else:
        index, found = [SampleIndex(*row) for row in receipt.rows], receipt.info.sha256
    if sha256 is not None and found != sha256:
        raise ValueError(f"{uri} has sha256 {found[:12]}, its manifest says {sha256[:12]}: {CHANGED}")
    return index


def scan_shard(uri: str) -> tuple[list[SampleIndex], list[Problem], str]:
    """One pass over a shard: (index, problems, sha256 of its bytes)."""
    return scan_bytes(files.read_view(uri), files.name_of(uri))


def scan_bytes(data: bytes | memoryview, name: str) -> tuple[list[SampleIndex], list[Problem], str]:
    """As `scan_shard`, of the bytes of a shard called `name`."""
    index: list[SampleIndex] = []
    problems: list[Problem] = []
    for item, span in _parse_spans(memoryview(data), name, fragment=False):
        if isinstance(item, Problem):
            problems.append(item)
        else:
            index.append(SampleIndex(item.key, len(item.captions), *span))
    return index, problems, hashlib.sha256(data).hexdigest()


def read_manifest(split_uri: str) -> Manifest:
    """The manifest of a split folder; for shards made by others (no manifest.json) it is built by scanning every tar.

    Raises ValueError when the folder holds neither, or fewer tars than its nshards.txt promises, and as `parse_manifest`.
    """
    uri = files.join(split_uri, NAME)
    if files.exists(uri):
        return parse_manifest(uri, files.read_bytes(uri))
    tars = list_shards(split_uri)
    with ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
        scanned = list(pool.map(scan_info, tars))
    infos, rejected = [info for info, _ in scanned], sum(problems for _, problems in scanned)
    return Manifest(split=files.name_of(split_uri), source="foreign shards", shards=infos, rejected=rejected, format=FOREIGN)


def scan_info(uri: str) -> tuple[ShardInfo, int]:
    """A shard's manifest row, and how many of its samples cannot be used."""
    index, problems, sha256 = scan_shard(uri)
    captions = sum(row.captions for row in index)
    info = ShardInfo(name=files.name_of(uri), samples=len(index), captions=captions, bytes=files.size_of(uri), sha256=sha256)
    return info, sum(p.what in ("sample", "shard") for p in problems)


class _Hashing:
    """A write-only stream that counts and hashes what passes through."""

    def __init__(self, stream: io.RawIOBase) -> None:
        self.stream, self.bytes, self.digest = stream, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.stream.write(data)
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)


def _members_of(record: Record, regions: bytes | None = None) -> Json:
    """regions: a region file as it is, in place of the record's."""
    if not record.key or set("./\\") & set(record.key):
        raise ValueError(f"key {record.key!r} must not be empty or hold a dot or slash: WebDataset cuts a key at its first dot")
    if record.image is None and record.regions is None and regions is None:
        raise ValueError(f"{record.key}: a sample needs an image or regions")
    captions = [{"id": c.id, "text": c.text, **c.meta} for c in record.captions]
    about = {"image_id": record.key, **record.meta, "split": record.split, "captions": captions}
    row: Json = {"__key__": record.key, "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode()}
    if record.image is not None:
        row[record.image_format] = record.image
    if regions is None and record.regions is not None:
        regions = record.regions.to_npz()
    if regions is not None:
        row[REGIONS] = regions
    return row


def _parse(tar: memoryview, shard: str, fragment: bool = False) -> Iterator[Sample | Problem]:
    for item, _ in _parse_spans(tar, shard, fragment):
        yield item


_Spanned = tuple[Sample | Problem, tuple[int, int]]
_Group = tuple[str, dict[str, Member]]  # sample key -> its members by extension


def _parse_spans(tar: memoryview, shard: str, fragment: bool) -> Iterator[_Spanned]:
    groups, others, problems = _groups(tar, shard, fragment)
    held: dict[str, list[set[str]]] = {}
    for key, parts in groups:
        held.setdefault(key, []).append(set(parts))
    seen: set[str] = set()
    for key, parts in groups:
        span = (min(m.begin for m in parts.values()), max(m.end for m in parts.values()))
        scattered = len(held[key]) > 1 and not set.intersection(*held[key])
        if key in seen:
            lost = _count(tar, key, parts)
            if not scattered:
                yield Problem(key, shard, "read", "a second sample of the same key; the first one is kept", captions=lost), span
        elif scattered:
            lost = sum(_count(tar, key, others_of_key) for name, others_of_key in groups if name == key)
            reason = "members of this sample are not next to each other; sort the tar by name"
            yield Problem(key, shard, "read", reason, captions=lost), span
        else:
            for item in _sample(shard, key, _content(tar, parts), others.get(key, [])):
                yield item, span
        seen.add(key)
    for problem in problems:
        yield problem, (0, 0)


def _groups(tar: memoryview, shard: str, fragment: bool) -> tuple[list[_Group], dict[str, list[str]], list[Problem]]:
    """Runs of members that share a key, where a repeated extension starts a new run; names of other kinds by key; and problems.

    Nothing is passed over: what belongs to no sample is a Problem of a member.
    """
    found: list[Member] = []
    problems: list[Problem] = []
    try:
        for member in members(tar, fragment):
            if isinstance(member, str):
                problems.append(Problem("", shard, "read", member, "shard"))
            else:
                found.append(member)
    except TarProblem as error:
        problems.append(Problem("", shard, "read", str(error), "shard"))
    known = {key for key, extension in map(cut_first, (m.name for m in found)) if key and extension in CONTENT}
    dotted = dotted_keys(m.name for m in found)
    groups: list[_Group] = []
    others: dict[str, list[str]] = {}
    for member in found:
        key, extension = cut_first(member.name)
        if extension not in CONTENT and (key not in known or cut_last(member.name)[0] in dotted):
            key, extension = cut_last(member.name)
        if not key or extension not in CONTENT:
            others.setdefault(key, []).append(member.name)
            continue
        if not groups or groups[-1][0] != key or extension in groups[-1][1]:
            groups.append((key, {}))
        groups[-1][1][extension] = member
    sampled = {key for key, _ in groups}
    for key in (key for key in others if key not in sampled):
        reason = f"of no kind that is read: {', '.join(others[key][:4])}; the kinds are {', '.join(f'.{e}' for e in sorted(CONTENT))}"
        problems.append(Problem(key, shard, "read", reason, "member"))
    return groups, others, problems


def _content(tar: memoryview, parts: dict[str, Member]) -> dict[str, bytes]:
    return {extension: bytes(tar[m.start : m.start + m.size]) for extension, m in parts.items()}


def _sample(shard: str, key: str, content: dict[str, bytes], others: list[str]) -> Iterator[Sample | Problem]:
    """The sample of one group, after a Problem for each caption that is dropped; or one Problem instead of the sample.

    others: the members of this key that are of no kind that is read.
    """
    try:
        meta, captions, bare = captions_of(key, content)
    except (ValueError, AttributeError, RecursionError) as error:
        yield Problem(key, shard, "read", f"captions cannot be read: {error}")
        return
    faults = [c.fault() for c in captions]
    kept = [c for c, fault in zip(captions, faults, strict=True) if not fault]
    image = next((content[f] for f in IMAGE_FORMATS if f in content), None)
    if not (kept or bare) or (not image and REGIONS not in content):
        names = ", ".join([*(f".{extension}" for extension in content), *(name.rpartition("/")[2] for name in others)])
        fields = list(meta) if not captions else []
        names += f", the json has {', '.join(fields)}" if fields else ""
        reason = "no image and no regions" if kept or bare else "no caption" if not captions else f"no usable caption: {faults[0]}"
        yield Problem(key, shard, "read", f"{reason} (members: {names})", captions=len(captions))
        return
    for fault in filter(None, faults):
        yield Problem(key, shard, "read", fault, "caption")
    stated = meta.get("image_id") is not None
    yield Sample(key, image or None, content.get(REGIONS), kept, meta if stated else meta | {"image_id": key}, stated)


def _count(tar: memoryview, key: str, parts: dict[str, Member]) -> int:
    """Captions of a sample that is left out, as far as they can be read."""
    content = {e: bytes(tar[m.start : m.start + m.size]) for e, m in parts.items() if e in ("json", "txt")}
    try:
        return len(captions_of(key, content)[1])
    except (ValueError, AttributeError, RecursionError):
        return 0
