"""Raw data -> WebDataset tar shards with a manifest, one Ray task a shard.

    itm pack -c demo.yaml data.root=/data/scenes
    itm pack -c coco.yaml data.source.options.path=/data/dataset_coco.json

Each split becomes <data.root>/<split>/00000.tar, 00001.tar, ... with an index beside every tar, quarantine.jsonl (one row for each
thing left out: key, shard, stage, reason) and, written last, manifest.json. Running it again does nothing; after a crash it goes on
with the missing shards and ends with the same bytes. White space in captions is normalised; images are checked, not changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

from itm.config import Part, Recipe
from itm.data import files
from itm.data.formats import Json, read_json
from itm.data.manifest import NAME, QUARANTINE, Manifest, Receipt, read_receipt, write_manifest, write_receipt
from itm.data.records import Problem, Record, check_image, json_fault
from itm.data.shards import read_manifest, scan_shard, write_shard
from itm.data.sources import SOURCES
from itm.data.sources.source import Source
from itm.kinds import build_part
from pipelines.cli import recipe_arguments, recipe_from, script

CLAIM, FORMAT = "pack.json", 1  # written first: whose shards these are going to be


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="delete shards that other choices made, then pack")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these splits (default: all of the source)")


def run(args: argparse.Namespace) -> None:
    for split, manifest in pack(recipe_from(args), overwrite=args.overwrite, splits=args.splits).items():
        print(
            f"{split}: {manifest.samples:,} images, {manifest.captions:,} captions in {len(manifest.shards)} shards, "
            f"{manifest.rejected:,} rejected, fingerprint {manifest.fingerprint()}"
        )


@dataclass(frozen=True)
class Job:
    """One shard to make: items [start, stop) of a split."""

    source: Part
    split: str
    image: str
    made_from: str
    uri: str
    start: int
    stop: int


def pack(recipe: Recipe, overwrite: bool = False, splits: list[str] | None = None) -> dict[str, Manifest]:
    """Pack the splits of `recipe.data.source`; returns their manifests.

    Raises ValueError when the output is unwritable or belongs to other choices, when a key is used twice, and when more than
    `data.max_reject_rate` of a split had to be rejected.
    """
    data = recipe.data
    if data.source is None:
        raise ValueError("data.source is not set, so there is nothing to pack; shards made elsewhere are read as they are")
    source = _source(data.source.model_dump_json())
    if unknown := set(splits or []) - set(source.splits):
        raise ValueError(f"no split {', '.join(sorted(unknown))} in this source; there are: {', '.join(source.splits)}")
    files.check_writable(data.root)
    return {split: _pack_split(recipe, split, overwrite) for split in splits or source.splits}


def _pack_split(recipe: Recipe, split: str, overwrite: bool) -> Manifest:
    data = recipe.data
    assert data.source is not None
    source = _source(data.source.model_dump_json())
    choices = {"source": source.identity(), "split": split, "shard_samples": data.shard_samples, "image": data.image}
    made_from = hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:12]
    folder, count = files.join(data.root, split), source.count(split)
    if not count:
        raise ValueError(f"split {split!r} of this source is empty; leave it out with --splits")
    _claim(folder, made_from, choices, overwrite)
    jobs = [
        Job(data.source, split, data.image, made_from, files.join(folder, f"{n:05d}.tar"), start, min(start + data.shard_samples, count))
        for n, start in enumerate(range(0, count, data.shard_samples))
    ]
    finished = files.exists(files.join(folder, NAME))
    receipts = {job.uri: receipt for job in jobs if (receipt := _usable(job, finished))}
    if finished and len(receipts) == len(jobs):
        return read_manifest(folder)
    with _tracked(recipe, split, folder, f"{data.source.kind} {made_from}") as told:
        receipts |= _run_jobs([job for job in jobs if job.uri not in receipts], f"pack {split}")
        files.remove_abandoned(folder)
        manifest = _close(folder, f"{data.source.kind} {made_from}", [receipts[job.uri] for job in jobs], data.max_reject_rate)
        if manifest.samples + manifest.rejected != count:
            raise ValueError(f"{folder}: {manifest.samples} samples packed and {manifest.rejected} rejected of {count}; pack it again")
        told(manifest)
        write_manifest(folder, manifest)
    return manifest


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


def _claim(folder: str, made_from: str, choices: Json, overwrite: bool) -> None:
    """Mark the folder as ours before the first shard; refuse one that holds other shards, unless told to delete them."""
    uri = files.join(folder, CLAIM)
    if files.exists(uri) and read_json(uri, FORMAT).get("made_from") == made_from:
        return
    ours = files.exists(uri)
    others = [f for suffix in (".tar", ".index.json", NAME, QUARANTINE, CLAIM) for f in files.list_files(folder, suffix)]
    if others and not overwrite:
        made = "made from other choices (source, options or data files)" if ours else "that this command did not make"
        raise ValueError(f"{folder} holds shards {made}; use another data.root, or --overwrite to delete and repack them")
    for other in sorted(others, key=lambda f: files.name_of(f) != NAME):  # the manifest goes first: no moment of a false one
        files.delete(other)
    files.write_atomic(uri, json.dumps({"format": FORMAT, "made_from": made_from, **choices}, indent=1, sort_keys=True).encode())


def _run_jobs(jobs: list[Job], title: str) -> dict[str, Receipt]:
    import ray
    from tqdm import tqdm

    from pipelines.on_ray.session import connect, core

    connect()
    task = ray.remote(num_cpus=core(), max_retries=3)(pack_shard)
    pending = {task.remote(job): job for job in jobs}
    receipts: dict[str, Receipt] = {}
    with tqdm(total=sum(job.stop - job.start for job in jobs), desc=title, unit="image", mininterval=1) as bar:
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            job = pending.pop(done)
            try:
                receipts[job.uri] = Receipt.model_validate_json(ray.get(done))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            bar.update(job.stop - job.start)
    return receipts


def pack_shard(job: Job) -> str:
    """Make one shard and its receipt (returned as JSON). What was written is read back before it counts."""
    name = files.name_of(job.uri)
    problems: list[Problem] = []
    info = write_shard(job.uri, _accepted(job, problems))
    problems = [replace(p, shard=name) for p in problems]
    index, unreadable, sha256 = scan_shard(job.uri)
    rejected = sum(p.what == "sample" for p in problems)
    if unreadable or sha256 != info.sha256 or len(index) + rejected != job.stop - job.start:
        reason = unreadable[0].reason if unreadable else f"{len(index)} written + {rejected} rejected of {job.stop - job.start}"
        raise ValueError(f"{job.uri} does not read back as written: {reason}")
    rows = [(row.key, row.captions, row.start, row.end) for row in index]
    receipt = Receipt(info=info, made_from=job.made_from, rows=rows, problems=problems)
    write_receipt(job.uri, receipt)
    return receipt.model_dump_json()


def _accepted(job: Job, problems: list[Problem]) -> Iterator[Record]:
    """The usable records of a slice; the others, and dropped captions, are added to `problems`."""
    keys: set[str] = set()
    for item in _source(job.source.model_dump_json()).records(job.split, job.start, job.stop):
        if isinstance(item, Record):
            captions = [replace(c, text=" ".join(c.text.split())) for c in item.captions]
            faults = [c.fault() for c in captions]
            problems += [Problem(item.key, "", "pack", fault, "caption") for fault in faults if fault]
            item = replace(item, captions=[c for c, fault in zip(captions, faults, strict=True) if not fault])
            reason = "a second sample of the same key" if item.key in keys else _fault(item, job.image)
            if not reason:
                keys.add(item.key)
                yield item
                continue
            item = Problem(item.key, "", "pack", reason)
        problems.append(item)


def _fault(record: Record, image: str) -> str | None:
    """Why a record cannot be packed, or None."""
    if fault := json_fault(record.key, record.meta, [c.meta for c in record.captions]):
        return fault
    if not record.captions:
        return "no caption"
    if image == "regions" and record.regions is None:
        return "no regions, but the recipe says data.image: regions (scenes make them with regions: true)"
    if image == "pixels" and record.image is None:
        return "no image, but the recipe says data.image: pixels"
    if record.image is not None:
        try:
            check_image(record.image)
        except ValueError as error:
            return str(error)
    return None


def _close(folder: str, made_from: str, receipts: list[Receipt], max_reject_rate: float) -> Manifest:
    """Quarantine table and checks over all shards; the manifest, which is not written yet."""
    problems = [p for receipt in receipts for p in receipt.problems]
    quarantine = files.join(folder, QUARANTINE)
    if problems or files.exists(quarantine):
        files.write_atomic(quarantine, "".join(p.row() + "\n" for p in problems).encode())
    shards = [r.info for r in receipts if r.info.samples]
    rejected, samples = sum(r.rejected for r in receipts), sum(s.samples for s in shards)
    if rejected > max_reject_rate * (samples + rejected):
        worst = next(p for p in problems if p.what != "caption")
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
    return Manifest(split=files.name_of(folder), source=made_from, shards=shards, rejected=rejected)


@lru_cache(maxsize=2)
def _source(part: str) -> Source:
    """Built once a worker process: a source may have a large annotation file to read."""
    choice = Part.model_validate_json(part)
    source: Source = build_part(SOURCES, choice.kind, choice.options, "source")
    return source


if __name__ == "__main__":
    script(__file__)
