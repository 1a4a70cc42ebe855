"""Copy shards into a clean folder: members of a sample side by side, unusable ones left out by name, a manifest and indexes beside them.

    itm repair /data/foreign/train --output /data/clean/train
    itm repair s3://bucket/coco --output /data/coco            # every split right below

For tars whose members are not grouped by key, that are truncated, or that hold links, unsafe names, second samples of a key, images
or region files that cannot be read. What stays is copied byte for byte, in the order of its first member; `/` in a key becomes `_`, and
a key that an earlier shard uses gets the name of its own shard in front.
quarantine.jsonl lists what was left out (key, shard, stage, reason). The source is not changed; running it again does nothing.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from itm.arguments import read_from, written_to
from itm.data import files
from itm.data.manifest import QUARANTINE, Manifest, Receipt, list_shards, manifest_of, read_receipt, write_manifest, write_receipt
from itm.data.records import Problem, check_image, json_fault
from itm.data.same_image import bytes_of
from itm.data.shards import Sample, copy_samples, read_samples, read_scattered, scan_shard
from itm.progress import over
from pipelines.cli import script
from pipelines.flow import kept_and_lost
from pipelines.inspect import splits_below

MADE = "repair of "
CLAIM = "repair.json"  # written first: the shards here are copies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", type=read_from, help="folder or URI of shards: one split, or a root of splits")
    parser.add_argument("--output", required=True, metavar="URI", type=written_to, help="where the clean copy goes: a folder of its own")


def run(args: argparse.Namespace) -> None:
    splits = [uri for uri in splits_below(args.uri) if not uri.endswith(".tar")]
    if not splits:
        raise ValueError(f"{args.uri} is one tar; give the folder it lies in")
    for uri in splits:
        output = args.output if uri == args.uri else files.join(args.output, files.name_of(uri))
        manifest = repair(uri, output)
        print(
            f"{output}: {manifest.samples:,} images, {manifest.captions:,} captions in {len(manifest.shards)} shards, "
            f"{manifest.rejected:,} rejected, fingerprint {manifest.fingerprint()}; {kept_and_lost(manifest, output)}"
        )


def repair(split_uri: str, output: str) -> Manifest:
    """The clean copy's manifest. Raises ValueError when the output holds other tars, or nothing usable is left."""
    if files.resolve(split_uri) == files.resolve(output):
        raise ValueError(f"--output must be another folder than {split_uri}")
    sources = list_shards(split_uri)
    if files.list_files(output, ".tar") and not files.exists(files.join(output, CLAIM)):
        raise ValueError(f"the shards in {output} were not made by `itm repair`; give another --output")
    files.check_writable(output)
    files.write_atomic(files.join(output, CLAIM), json.dumps({"source": split_uri}).encode())
    files.remove_abandoned(output)
    receipts: list[Receipt] = []
    taken = Taken()
    for uri in over(sources, f"repair {files.name_of(split_uri)}", len(sources), "shard"):
        receipts.append(repair_shard(uri, files.join(output, files.name_of(uri)), taken))
    problems = [p for receipt in receipts for p in receipt.problems]
    files.write_atomic(files.join(output, QUARANTINE), "".join(p.row() + "\n" for p in problems).encode())
    shards = [r.info for r in receipts if r.info.samples]
    if not shards:
        raise ValueError(f"{split_uri}: not one sample can be used; the reasons are in {files.join(output, QUARANTINE)}")
    rejected = sum(p.what == "sample" for p in problems)
    manifest = manifest_of(files.name_of(output), f"{MADE}{split_uri}", shards, rejected)
    write_manifest(output, manifest)
    return manifest


@dataclass(frozen=True)
class Taken:
    """What the shards before this one hold: the shard of each key, and the image_id of each image file."""

    owner: dict[str, str] = field(default_factory=dict)
    image_id: dict[str, object] = field(default_factory=dict)

    def add(self, sample: Sample, shard: str) -> Sample:
        """The sample, with the image_id of its first copy where the source stated none: two shards may call two images by one key."""
        self.owner[sample.key] = shard
        own = sample.meta["image_id"] if sample.states_image else sample.key
        image_id = self.image_id.setdefault(bytes_of(sample), own)
        return sample if sample.states_image else replace(sample, meta=sample.meta | {"image_id": image_id})


def repair_shard(uri: str, target: str, taken: Taken) -> Receipt:
    """Copy one shard; read it back; its receipt. A copy of the same bytes is kept as it is."""
    made_from = MADE + scan_shard(uri)[2][:12]
    done = read_receipt(target)
    if done is not None and done.made_from == made_from:
        for sample in read_samples(target):
            if isinstance(sample, Sample):
                taken.add(sample, files.name_of(uri))
        return done
    problems: list[Problem] = []
    info = copy_samples(target, _usable(uri, taken, problems), files.name_of(target.rsplit("/", 1)[0]))
    index, unreadable, sha256 = scan_shard(target)
    if unreadable or sha256 != info.sha256 or len(index) != info.samples:
        raise ValueError(f"{target} does not read back as written: {unreadable[0].reason if unreadable else 'other samples'}")
    rows = [(row.key, row.captions, row.start, row.end) for row in index]
    receipt = Receipt(info=info, made_from=made_from, rows=rows, problems=problems)
    write_receipt(target, receipt)
    return receipt


def _usable(uri: str, taken: Taken, problems: list[Problem]) -> Iterator[Sample]:
    """The samples that can be copied, without their unreadable members; everything else is added to `problems`."""
    from itm.data.preprocess import read_regions  # with torch, which the command line must not wait for

    shard = files.name_of(uri)
    for item in read_scattered(uri):
        if isinstance(item, Problem):
            problems.append(item)
            continue
        key = re.sub(r"[./\\]", "_", item.key)  # WebDataset cuts a key at its first dot
        if taken.owner.get(key, shard) != shard:
            key = f"{re.sub(r'[.]', '_', shard.removesuffix('.tar'))}_{key}"
        fault = json_fault(item.meta, [c.meta for c in item.captions])
        if key in taken.owner or fault:
            reason = fault or f"a second sample of the same key; the first one is in {taken.owner[key]}"
            problems.append(Problem(key, shard, "repair", reason, captions=len(item.captions)))
            continue
        faults = {"image": _fault(check_image, item.image), "regions": _fault(lambda data: read_regions(data, 1 << 16), item.regions)}
        image, regions = (None if faults[name] else getattr(item, name) for name in ("image", "regions"))
        clean = replace(item, key=key, image=image, regions=regions)
        lost = clean.image is None and clean.regions is None
        reasons = "; ".join(f"{name}: {fault}" for name, fault in faults.items() if fault)
        if reasons:
            held = len(item.captions) if lost else 0
            problems.append(Problem(key, shard, "repair", reasons, "sample" if lost else "member", held))
        if not lost:
            yield taken.add(clean, shard)


def _fault(check: Callable[[bytes], object], data: bytes | None) -> str | None:
    if data is None:
        return None
    try:
        check(data)
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    script(__file__)
