"""Raw data -> WebDataset tar shards with a manifest, one Ray task a shard.

    itm pack -c demo.yaml data.root=/data/scenes
    itm pack -c coco.yaml data.source.options.path=/data/dataset_coco.json

Each split becomes <data.root>/<split>/00000.tar, 00001.tar, ... with an index beside every tar, quarantine.jsonl (one row for each
thing left out: key, shard, stage, reason) and, written last, manifest.json. Running it again does nothing; after a crash it goes on
with the missing shards and ends with the same bytes. What was added to the source since goes to new shards behind the old ones, which
keep their bytes; what was taken away or changed is refused by name. White space in captions is normalised. JPEG, PNG and WebP files are
checked and stored byte for byte, GIF, BMP and TIFF as PNG of their first frame (`converted_from` in the json); the format is told by the
bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any

from itm.config import Part, Recipe
from itm.data import files, lease
from itm.data.formats import Json, read_json
from itm.data.manifest import (
    NAME,
    QUARANTINE,
    Manifest,
    Receipt,
    manifest_of,
    read_receipt,
    receipt_uri,
    write_manifest,
    write_receipt,
)
from itm.data.patience import ASKED
from itm.data.records import Problem, Record, check_image, check_rows, image_format, json_fault, storable
from itm.data.shards import read_manifest, scan_shard, write_shard
from itm.data.sources.parting import build_source
from itm.data.sources.source import Source
from itm.progress import Progress
from pipelines.adding import Layout, added_since, layout_after, ranges, rekeyed, shard_uri, standing
from pipelines.cli import recipe_arguments, recipe_from, script
from pipelines.featuring import of_photos
from pipelines.flow import kept_and_lost, others_passed_over

CLAIM, FORMAT = "pack.json", 2  # written first: whose shards these are going to be; 2 where a source was added to, else 1
MOST_QUEUED = 1_000  # shards that Ray is asked for at a time: each look at those that are waited for costs as much as there are


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="delete shards that other choices made, then pack")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these splits (default: all of the source)")


def run(args: argparse.Namespace) -> None:
    recipe = of_photos(recipe_from(args))
    root = recipe.data.root
    before = {files.name_of(folder): standing(folder) for folder in files.list_folders(root)}
    for split, manifest in pack(recipe, overwrite=args.overwrite, splits=args.splits).items():
        print(
            f"{split}: {manifest.samples:,} images, {manifest.captions:,} captions in {len(manifest.shards)} shards, "
            f"{manifest.rejected:,} rejected, fingerprint {manifest.fingerprint()}; {kept_and_lost(manifest, files.join(root, split))}"
            f"{'' if args.overwrite else added_since(before.get(split), manifest)}"
        )
        if count := others_passed_over(files.join(root, split)):
            print(f"{split}: {count:,} other files were passed over; each is named in {QUARANTINE}")
    there, has = set(map(files.name_of, files.list_folders(root))), ", ".join(source_of(recipe).splits)
    for key in ("train_split", "val_split", "test_split"):
        if (split := getattr(recipe.data, key)) and split not in there:
            print(f"no split {split!r} was packed, and data.{key} names it: the source has {has}", file=sys.stderr)


def kept(args: argparse.Namespace) -> str:
    """What a packing that is stopped leaves behind."""
    data = of_photos(recipe_from(args)).data
    whole = sum(len(files.list_files(folder, ".index.json")) for folder in files.list_folders(data.root))
    return f"{whole:,} whole shards are kept in {data.root}"


@dataclass(frozen=True)
class Job:
    """One shard to make: items [start, stop) of a split, or of those that were added to it; `renamed` then gives some another key."""

    source: Part
    split: str
    image: str
    made_from: str
    uri: str
    start: int
    stop: int
    places: list[Any] | None = None  # of the items, where the source had to look through its data for them
    regions_dtype: str = "fp16"
    renamed: dict[str, str] = field(default_factory=dict)


def pack(recipe: Recipe, overwrite: bool = False, splits: list[str] | None = None) -> dict[str, Manifest]:
    """Pack the splits of `recipe.data.source`; returns their manifests.

    Raises ValueError when the output is unwritable or belongs to other choices, when a key is used twice, and when more than
    `data.max_reject_rate` of a split had to be rejected.
    """
    recipe = of_photos(recipe)
    _source.cache_clear()  # the files of a source may be others since this process looked
    data, source = recipe.data, source_of(recipe)
    if unknown := set(splits or []) - set(source.splits):
        raise ValueError(f"no split {', '.join(sorted(unknown))} in this source; there are: {', '.join(source.splits)}")
    files.check_writable(data.root)
    made = {}
    for split in splits or source.splits:
        with lease.held(files.join(data.root, split), "pack"):
            made[split] = _pack_split(recipe, split, overwrite)
    return made


def packed(recipe: Recipe) -> dict[str, Manifest] | None:
    """The manifests of all splits of the source where each was finished from these choices; None while there is packing to do."""
    recipe = of_photos(recipe)
    assert recipe.data.source is not None
    source = open_source(recipe.data.source)
    manifests = {}
    for split in source.splits:
        folder = files.join(recipe.data.root, split)
        claim = files.join(folder, CLAIM)
        if not files.exists(files.join(folder, NAME)) or not files.exists(claim):
            return None
        held, made_from, manifest = read_json(claim, FORMAT), _digest(_choices(recipe, source, split)), read_manifest(folder)
        if held.get("made_from") != made_from or not Layout.of(held).finished(manifest, made_from):
            return None
        manifests[split] = manifest
    return manifests


def _choices(recipe: Recipe, source: Source, split: str) -> Json:
    """What the bytes of a split depend on."""
    data = recipe.data
    choices = {"source": source.identity(), "split": split, "shard_samples": data.shard_samples, "image": data.image}
    return choices | ({"regions_dtype": data.regions_dtype} if data.regions_dtype != "fp16" else {})


def _digest(choices: Json) -> str:
    return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:12]


def source_of(recipe: Recipe) -> Source:
    """Raises ValueError when the recipe names none."""
    if recipe.data.source is None:
        raise ValueError("data.source is not set, so there is nothing to pack; shards made elsewhere are read as they are")
    return open_source(recipe.data.source)


def _pack_split(recipe: Recipe, split: str, overwrite: bool) -> Manifest:
    data = recipe.data
    assert data.source is not None
    source = open_source(data.source)
    choices = _choices(recipe, source, split)
    made_from = _digest(choices)
    folder, count = files.join(data.root, split), source.count(split)
    if not count:
        raise ValueError(f"split {split!r} of this source is empty; leave it out with --splits")
    layout = _claim(folder, made_from, choices, overwrite, source)
    earlier = layout.receipts(folder)
    jobs = list(_jobs(recipe, source, folder, made_from, layout))
    finished = files.exists(files.join(folder, NAME)) and layout.finished(read_manifest(folder), made_from)
    receipts = {job.uri: receipt for job in jobs if (receipt := _usable(job, finished))}
    if finished and len(receipts) == len(jobs):
        return read_manifest(folder)
    made = f"{data.source.kind} {made_from}"
    with _tracked(recipe, split, folder, made) as told:
        receipts |= _run_jobs(recipe, [job for job in jobs if job.uri not in receipts], f"pack {split}")
        files.remove_abandoned(folder)
        manifest = _close(folder, made, earlier + [receipts[job.uri] for job in jobs], data.max_reject_rate, source.passed_over(split))
        if manifest.samples + manifest.rejected != count:
            raise ValueError(f"{folder}: {manifest.samples} samples packed and {manifest.rejected} rejected of {count}; pack it again")
        told(manifest)
        write_manifest(folder, manifest)
    return manifest


def _jobs(recipe: Recipe, source: Source, folder: str, made_from: str, layout: Layout) -> Iterator[Job]:
    """Of the shards that the last packing makes."""
    data, split = recipe.data, files.name_of(folder)
    assert data.source is not None
    items = layout.items(source.count(split))
    for n, start in enumerate(range(0, len(items), data.shard_samples)):
        chosen = items[start : start + data.shard_samples]
        places = [place for first, stop in ranges(chosen) for place in source.places(split, first, stop)]
        rest = (start, start + len(chosen), places, data.regions_dtype, layout.renamed)
        yield Job(data.source, split, data.image, made_from, shard_uri(folder, layout.first + n), *rest)


@contextmanager
def _tracked(recipe: Recipe, split: str, folder: str, source: str) -> Iterator[Callable[[Manifest], None]]:
    """One run per packed split, for the time of the work. The manifest is told when the shards are safe: after an error nothing is lost."""
    from itm.tracking.lineage import DatasetRef, packages_used
    from itm.tracking.runs import Tracker

    params, tags = {"split": split, "source": source, "root": folder}, {"stage": "pack", **packages_used(recipe.model_dump(mode="json"))}
    with Tracker.start(recipe.registry.experiment, f"pack {split}", params, tags) as tracker:

        def told(manifest: Manifest) -> None:
            tracker.datasets([DatasetRef(manifest.split, manifest.fingerprint(), folder, "packing")])
            tracker.tags({"shards": len(manifest.shards), "manifest": manifest.fingerprint()})
            flow = {"rows_in": manifest.samples + manifest.rejected, "rows_out": manifest.samples, "rows_rejected": manifest.rejected}
            tracker.metrics(flow | {"captions": manifest.captions, "bytes": sum(s.bytes for s in manifest.shards)})
            tracker.flush()
            if files.exists(quarantine := files.join(folder, QUARANTINE)):
                with files.local_copy(quarantine) as rows:
                    tracker.artifact(rows)

        yield told


def _usable(job: Job, finished: bool) -> Receipt | None:
    """What rejected something is tried again until the manifest stands: the files may have been mended since."""
    receipt = read_receipt(job.uri)
    return receipt if receipt and receipt.made_from == job.made_from and (finished or not receipt.problems) else None


def _claim(folder: str, made_from: str, choices: Json, overwrite: bool, source: Source) -> Layout:
    """Mark the folder as ours before the first shard. One with shards of ours is added to; one with others is refused, unless told to
    delete them."""
    uri = files.join(folder, CLAIM)
    held = read_json(uri, FORMAT) if files.exists(uri) else None
    if held is not None and held.get("made_from") == made_from:
        return Layout.of(held)
    others = [f for suffix in (".tar", ".index.json", NAME, QUARANTINE, CLAIM) for f in files.list_files(folder, suffix)]
    layout = Layout()
    if others and not overwrite:
        dtype = str(choices.get("regions_dtype", "fp16"))
        layout = layout_after(folder, held, choices, source, lambda item: _as_stored(_usual(item, dtype)[0]))
        keep = {name for n in range(layout.first) for name in (shard_uri(folder, n), receipt_uri(shard_uri(folder, n)))}
        others = [f for f in others if f.endswith((".tar", ".index.json")) and f not in keep]  # of an adding that was stopped
    for other in sorted(others, key=lambda f: files.name_of(f) != NAME):  # the manifest goes first: no moment of a false one
        files.delete(other)
    said = {"format": FORMAT if layout.kept else 1, "made_from": made_from, **choices, **layout.said()}
    files.write_atomic(uri, json.dumps(said, indent=1, sort_keys=True).encode())
    return layout


def _run_jobs(recipe: Recipe, jobs: list[Job], title: str) -> dict[str, Receipt]:
    import ray

    from pipelines.on_ray import meters
    from pipelines.on_ray.reach import counted, shared
    from pipelines.on_ray.session import core
    from pipelines.places import places_in

    receipts, rest, pending = dict[str, Receipt](), iter(jobs), dict[Any, Job]()
    read = {place.key: place.given for place in places_in(recipe) if place.key.startswith("data.source.")}
    with shared({"data.root": recipe.data.root}, read) as tokens, Progress(title, sum(j.stop - j.start for j in jobs), "image") as progress:
        task = ray.remote(num_cpus=core(), max_retries=3)(counted)
        for _ in jobs:
            pending |= {task.remote(tokens, pack_shard, job): job for job in islice(rest, MOST_QUEUED - len(pending))}
            (done,), _ = ray.wait(list(pending), num_returns=1)
            job = pending.pop(done)
            try:
                receipt, again, waited = ray.get(done)
                told = receipts[job.uri] = Receipt.model_validate_json(receipt)
                ASKED.add(waited, again)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            progress.update(job.stop - job.start)
            meters.packed(job.split, job.stop - job.start, told.rejected, told.info.bytes)
    return receipts


def pack_shard(job: Job) -> str:
    """Make one shard and its receipt (returned as JSON). What was written is read back before it counts."""
    name = files.name_of(job.uri)
    problems: list[Problem] = []
    read = Counter[str]()
    info = write_shard(job.uri, accepted(job, problems, read))
    problems = [replace(p, shard=name) for p in problems]
    index, unreadable, sha256 = scan_shard(job.uri)
    rejected = sum(p.what == "sample" for p in problems)
    if unreadable or sha256 != info.sha256 or len(index) + rejected != job.stop - job.start:
        reason = unreadable[0].reason if unreadable else f"{len(index)} written + {rejected} rejected of {job.stop - job.start}"
        raise ValueError(f"{job.uri} does not read back as written: {reason}")
    check_rows(f"captions of {job.uri}", read["captions"], info.captions, sum(p.lost_captions for p in problems))
    rows = [(row.key, row.captions, row.start, row.end) for row in index]
    receipt = Receipt(info=info, made_from=job.made_from, rows=rows, problems=problems)
    write_receipt(job.uri, receipt)
    return receipt.model_dump_json()


def accepted(job: Job, problems: list[Problem], read: Counter[str]) -> Iterator[Record]:
    """The usable records of a slice; the others, and dropped captions, are added to `problems`. read: counts `captions` that came in."""
    keys: set[str] = set()
    source = _source(job.source.model_dump_json(), os.getcwd(), job.made_from)
    bare = source.uncaptioned(job.split)
    source.regions_dtype = job.regions_dtype
    for item in source.records(job.split, job.start, job.stop) if job.places is None else source.at(job.split, job.places):
        read["captions"] += len(item.captions) if isinstance(item, Record) else item.captions
        item = rekeyed(item, job.renamed.get(item.key, item.key))
        if isinstance(item, Record):
            item, faults = _usual(item, job.regions_dtype)
            problems += [Problem(item.key, "", "pack", fault, "caption") for fault in faults]
            reason = "a second sample of the same key" if item.key in keys else _fault(item, job.image, bare)
            if not reason:
                item, reason = _stored(item)
            if not reason:
                keys.add(item.key)
                yield item
                continue
            item = Problem(item.key, "", "pack", reason, captions=len(item.captions))
        problems.append(item)


def _usual(record: Record, regions_dtype: str) -> tuple[Record, list[str]]:
    """The record with the captions and the regions that a shard holds of it; what is wrong with the other captions."""
    if record.regions is not None:
        record = replace(record, regions=replace(record.regions, whole=regions_dtype == "fp32"))
    captions = [replace(c, text=" ".join(c.text.split())) for c in record.captions]
    faults = [c.fault() for c in captions]
    kept = [c for c, fault in zip(captions, faults, strict=True) if not fault]
    return replace(record, captions=kept), [fault for fault in faults if fault]


def _fault(record: Record, image: str, bare: bool) -> str | None:
    """Why a record cannot be packed, or None. bare: its split is of images without captions."""
    if fault := json_fault(record.key, record.meta, [c.meta for c in record.captions]):
        return fault
    if not record.captions and not bare:
        return "no caption"
    if image == "regions" and record.regions is None:
        return "no regions, but the recipe says data.image: regions (scenes make them with regions: true)"
    if image == "pixels" and record.image is None:
        return "no image, but the recipe says data.image: pixels"
    return None


def _stored(record: Record) -> tuple[Record, str | None]:
    """The record with its image as a shard holds it, which is another file only of a GIF, BMP or TIFF; and why it has none."""
    if record.image is None:
        return record, None
    try:
        check_image(record.image)
        return _as_stored(record), None
    except ValueError as error:
        return record, str(error)


def _as_stored(record: Record) -> Record:
    """Raises ValueError for an image that cannot be stored."""
    if record.image is None:
        return record
    image, kind = storable(record.image)
    if image is not record.image:
        record = replace(record, meta=record.meta | {"converted_from": image_format(record.image)})
    return replace(record, image=image, image_format=kind)


def _close(folder: str, made_from: str, receipts: list[Receipt], max_reject_rate: float, passed_over: list[Problem]) -> Manifest:
    """Quarantine table and checks over all shards; the manifest, which is not written yet."""
    problems = [*passed_over, *(p for receipt in receipts for p in receipt.problems)]
    quarantine = files.join(folder, QUARANTINE)
    if problems or files.exists(quarantine):
        files.write_atomic(quarantine, "".join(p.row() + "\n" for p in problems).encode())
    shards = [r.info for r in receipts if r.info.samples]
    rejected, samples = sum(r.rejected for r in receipts), sum(s.samples for s in shards)
    if rejected > max_reject_rate * (samples + rejected):
        worst = next(p for p in problems if p.what in ("sample", "shard"))
        raise ValueError(
            f"{folder}: {rejected:,} of {samples + rejected:,} samples rejected, more than data.max_reject_rate={max_reject_rate:g}; "
            f"the first: {worst.key}: {worst.reason}. All are in {quarantine}"
        )
    owner: dict[str, str] = {}
    for receipt in receipts:
        for key, *_ in receipt.rows:
            if key in owner:
                raise ValueError(f"{folder}: key {key!r} is in {owner[key]} and in {receipt.info.name}; keys must be unique in a split")
            owner[key] = receipt.info.name
    return manifest_of(files.name_of(folder), made_from, shards, rejected)


def open_source(part: Part) -> Source:
    """Raises ValueError for an unknown kind or option, and as the source does."""
    return _source(part.model_dump_json(), os.getcwd())


@lru_cache(maxsize=2)
def _source(part: str, folder: str, made_from: str = "") -> Source:
    """Built once a worker process and state of its files, which may be large. folder: that relative paths begin at."""
    choice = Part.model_validate_json(part)
    return build_source(choice.kind, choice.options)


if __name__ == "__main__":
    script(__file__)
