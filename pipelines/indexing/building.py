"""Building an index: which shards have no vectors yet, who makes them, and when it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import itm
from itm.data import files
from itm.data.formats import Json
from itm.data.manifest import QUARANTINE, Manifest, check_present
from itm.data.records import Problem
from itm.data.shards import read_manifest
from itm.progress import Progress
from itm.retrieval.kept import matcher_identity
from itm.retrieval.loading import place_of, written_place
from itm.retrieval.store import (
    DTYPES,
    NAME,
    Catalogue,
    Choices,
    Entry,
    SplitEntry,
    read_catalogue,
    read_header,
    write_catalogue,
)
from itm.types import Matcher
from pipelines.indexing.jobs import taken, target_of, usable
from pipelines.indexing.removing import still_removed
from pipelines.on_ray.shard_actors import ShardJob, through_actors


@dataclass(frozen=True)
class Wanted:
    """What to build. shards: folders of splits; part: (k, n), the k-th of n shares, from 1; merge: indexes whose vectors are taken over.

    workers: actors, 0 = in this process, None = one for each GPU, or one. fields: metadata that is kept to filter by, None = all flat ones.
    """

    model: str | Matcher
    shards: tuple[str, ...]
    output: str
    dtype: str = "fp16"
    fields: tuple[str, ...] | None = None
    batch_size: int = 64
    device: str = "auto"
    workers: int | None = 0
    add: bool = False
    overwrite: bool = False
    part: tuple[int, int] = (1, 1)
    merge: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype} is unknown; vectors are stored as {', '.join(DTYPES)}")
        if not self.shards and not self.add:
            raise ValueError("name what to index: --shards FOLDER of a split (several may be named), or --photos FOLDER")
        if not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(f"--part {self.part[0]}/{self.part[1]} is no share: say K/N with K from 1 to N")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size is {self.batch_size}; a batch holds at least one image")


@dataclass(frozen=True)
class Split:
    """A split to index. folder: of its vectors in the index."""

    uri: str
    folder: str
    manifest: Manifest


def build(wanted: Wanted) -> Catalogue | None:
    """Make (or complete) an index; None while the shards of other parts are missing.

    Raises ValueError for a folder that holds an index of other choices, shards that changed since (without `add`), and vectors by which
    nothing can be found.
    """
    wanted.check()
    files.check_writable(wanted.output)
    matcher = itm.load_matcher(wanted.model, allow=wanted.allow) if isinstance(wanted.model, str) else wanted.model
    choices = Choices(matcher_identity(matcher), wanted.dtype, wanted.fields)
    before = _before(wanted, choices)
    splits = _splits(wanted, before)
    if before and not wanted.add and (changed := _changed(wanted, before, splits)):
        raise ValueError(f"{wanted.output} is an index of other shards: {changed}. Bring it up to date with --add, or --overwrite it")
    jobs = [job for split in splits for job in _jobs(wanted, choices, split)]
    with ThreadPoolExecutor(8) as pool:
        todo = [job for job, done in zip(jobs, pool.map(usable, jobs), strict=True) if done is None]
        merged = set(pool.map(lambda job: taken(wanted.merge, job), todo))
    todo = [job for job in todo if job not in merged]
    share = todo[wanted.part[0] - 1 :: wanted.part[1]]
    images = {files.join(s.uri, shard.name): shard.samples for s in splits for shard in s.manifest.shards}
    with Progress(f"index {files.name_of(wanted.output)}", sum(images[job.source] for job in share), "image") as progress:
        by_target = {job.target: job for job in share}
        for target in _made(wanted, matcher, choices, share):
            progress.update(images[by_target[target].source])
    files.remove_abandoned(wanted.output)
    return _closed(wanted, Catalogue(choices, matcher.kind, []), splits, before)


def finished(wanted: Wanted) -> Catalogue | None:
    """The index, where it is whole, of this matcher, and of the shards as they are now; None while there is work to do."""
    matcher = itm.load_matcher(wanted.model, allow=wanted.allow) if isinstance(wanted.model, str) else wanted.model
    found = read_catalogue(wanted.output)
    if found.choices != Choices(matcher_identity(matcher), wanted.dtype, wanted.fields):
        return None
    named = {files.absolute(uri).rstrip("/"): read_manifest(uri).fingerprint() for uri in wanted.shards}
    return found if named == {place_of(wanted.output, s.uri): s.fingerprint for s in found.splits} else None


def _before(wanted: Wanted, choices: Choices) -> Catalogue | None:
    """The finished index that is there. Raises ValueError where it, or one that was begun, is of other choices and must stay."""
    held: Json | None = None
    found: Catalogue | None = None
    if files.exists(files.join(wanted.output, NAME)):
        found = read_catalogue(wanted.output)
        held = found.choices.said()
    else:
        begun = (uri for folder in files.list_folders(wanted.output) for uri in files.list_files(folder, ".arrow"))
        header = next((said for uri in begun if (said := read_header(uri)) is not None), None)
        held = header and {name: header.get(name) for name in choices.said()}
    said = choices.said()
    if held is None or (held == said and not wanted.overwrite):
        return found
    if not wanted.overwrite:
        differ = ", ".join(f"{name} {held[name]}, not {said[name]}" for name in said if held[name] != said[name])
        raise ValueError(f"{wanted.output} holds an index of other choices ({differ}): name another --output, or --overwrite it")
    if found is not None:
        files.delete(files.join(wanted.output, NAME))
    for uri in [uri for folder in files.list_folders(wanted.output) for uri in files.list_files(folder, ".arrow")]:
        files.delete(uri)
    return None


def _splits(wanted: Wanted, before: Catalogue | None) -> list[Split]:
    """The splits that were indexed, then those that are named, each with a folder of its own name."""
    known = {place_of(wanted.output, s.uri): s.folder for s in before.splits} if before else {}
    named = list(dict.fromkeys(files.absolute(uri).rstrip("/") for uri in wanted.shards))
    found: list[Split] = []
    for uri in [*known, *(uri for uri in named if uri not in known)] if wanted.add or not before else named:
        folder = known.get(uri) or files.name_of(uri)
        if uri not in known and folder in {s.folder for s in found} | set(known.values()):
            folder = f"{folder}-{hashlib.sha256(uri.encode()).hexdigest()[:6]}"
        manifest = read_manifest(uri)
        check_present(uri, manifest)
        found.append(Split(uri, folder, manifest))
    if not sum(split.manifest.samples for split in found):
        raise ValueError(f"{', '.join(split.uri for split in found)} holds no image to index")
    return found


def _changed(wanted: Wanted, before: Catalogue, splits: Sequence[Split]) -> str | None:
    was = {place_of(wanted.output, s.uri): s.fingerprint for s in before.splits}
    now = {split.uri: split.manifest.fingerprint() for split in splits}
    for uri in {**was, **now}:
        if was.get(uri) != now.get(uri):
            return f"{uri} had the fingerprint {was.get(uri, 'none')}, and has {now.get(uri, 'none')}"
    return None


# --- shards -----------------------------------------------------------------------------------------------------------------------------


def _jobs(wanted: Wanted, choices: Choices, split: Split) -> Iterator[ShardJob]:
    for shard in split.manifest.shards:
        target = target_of(wanted.output, split.folder, shard.name)
        yield ShardJob(files.join(split.uri, shard.name), shard.sha256, target, split.folder, choices.made_from(shard.sha256))


def _made(wanted: Wanted, matcher: Matcher, choices: Choices, todo: Sequence[ShardJob]) -> Iterator[str]:
    """Encode shards in any order; yields the file of each as it is written."""
    if not todo:
        return
    from pipelines.indexing.actors import Embed, Prepare, in_this_process, prepared_apart

    form = prepared_apart(matcher)
    if wanted.workers == 0 or not isinstance(wanted.model, str):
        yield from in_this_process(Embed(matcher, choices, wanted.batch_size, wanted.device), Prepare(form), todo)
        return
    from pipelines.on_ray.reach import shared

    rows: list[Json] = [{"job": json.dumps(asdict(job))} for job in todo]
    with shared({"--output": wanted.output}, read={f"--shards {uri}": uri for uri in wanted.shards}) as tokens:

        def given(device: str) -> tuple[object, ...]:
            return wanted.model, choices, wanted.batch_size, device, tokens, wanted.allow

        for row in through_actors(rows, Prepare(form, tokens), Embed, given, wanted.workers):
            yield row["uri"]


# --- the whole --------------------------------------------------------------------------------------------------------------------------


def _closed(wanted: Wanted, catalogue: Catalogue, splits: Sequence[Split], before: Catalogue | None) -> Catalogue | None:
    """Write `index.json` and the quarantine table, once every shard is there."""
    earlier = {s.folder: s for s in before.splits} if before else {}
    entries: list[SplitEntry] = []
    problems: list[Problem] = []
    missing = 0
    for split in splits:
        jobs = list(_jobs(wanted, catalogue.choices, split))
        with ThreadPoolExecutor(8) as pool:
            headers = list(pool.map(usable, jobs))
        missing += headers.count(None)
        own = [_entry(shard.bytes, job, said) for shard, job, said in zip(split.manifest.shards, jobs, headers, strict=True) if said]
        problems += [Problem(**problem) for said in headers if said for problem in said["problems"]]
        was = {entry.name: entry for entry in (earlier[split.folder].shards if split.folder in earlier else [])}
        own = [still_removed(files.join(wanted.output, split.folder), entry, was.get(entry.name)) for entry in own]
        names = {entry.name for entry in own}
        gone = [replace(entry, gone=True) for entry in was.values() if entry.name not in names]
        uri = written_place(wanted.output, split.uri)
        entries.append(SplitEntry(uri, split.folder, split.manifest.fingerprint(), own + gone))
    if missing:
        print(f"{missing} shards are left to other parts: `itm index` without --part makes what is missing and finishes the index")
        return None
    if not sum(entry.images for split in entries for entry in split.shards if not entry.gone):
        first = f"; the first: {problems[0].key}: {problems[0].reason}" if problems else ""
        raise ValueError(f"no image of {', '.join(split.uri for split in splits)} can be read by this matcher{first}")
    table = files.join(wanted.output, QUARANTINE)
    if problems or files.exists(table):
        files.write_atomic(table, "".join(problem.row() + "\n" for problem in problems).encode())
    whole = replace(catalogue, splits=entries, settings=before.settings if before and before.splits == entries else {})
    write_catalogue(wanted.output, whole)
    return whole


def _entry(size: int, job: ShardJob, said: Json) -> Entry:
    rejected = sum(problem["what"] in ("sample", "shard") for problem in said["problems"])
    return Entry(files.name_of(job.source), job.sha256, size, said["images"], said["captions"], rejected)
