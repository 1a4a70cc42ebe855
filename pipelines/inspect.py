"""Say what a folder of shards holds: samples, captions, members, image sizes, problems. Reads any WebDataset of image-caption pairs.

    itm inspect /data/scenes                 every split below the folder
    itm inspect s3://bucket/coco/train       one split
    itm inspect shards/train/00003.tar       one shard
    itm inspect /data/img2dataset --index    also write manifest.json and an index beside each tar: later stages start at once

Exit code 1 when anything is wrong: unusable samples, or shards that differ from their manifest.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from itm.data import files
from itm.data.manifest import FOREIGN, NAME, Manifest, Receipt, ShardInfo, list_shards, write_manifest, write_receipt
from itm.data.records import Problem, check_image
from itm.data.shards import REGIONS, read_manifest, scan_bytes
from itm.data.tar import Member, TarProblem, members
from itm.progress import over
from pipelines.cli import script

SIZED = 64  # images of a split that are decoded
SHOWN = 10  # problems printed by name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", help="folder or URI of shards: a root of splits, one split, or one .tar")
    parser.add_argument("--index", action="store_true", help="write manifest.json and indexes for shards made by other tools")


def run(args: argparse.Namespace) -> int:
    healthy = True
    for uri in splits_below(args.uri):
        report = inspect(uri)
        print(report.text())
        healthy &= not report.problems
        if args.index and not uri.endswith(".tar"):
            print(_write_index(uri, report))
    return 0 if healthy else 1


@dataclass
class Report:
    """What one split holds. sizes: (width, height) of sampled images; captions: how many samples have so many captions."""

    uri: str
    layout: str = ""
    infos: list[ShardInfo] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    captions: Counter[int] = field(default_factory=Counter)
    members: Counter[str] = field(default_factory=Counter)
    member_bytes: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def text(self) -> str:
        samples, captions = sum(self.captions.values()), sum(n * times for n, times in self.captions.items())
        lines = [
            f"{self.uri}",
            f"  layout    {self.layout}",
            f"  shards    {len(self.infos):,}, {sum(i.bytes for i in self.infos):,} bytes",
        ]
        lines.append(f"  samples   {samples:,}")
        if samples:
            spread = f"{min(self.captions)} / {captions / samples:.2f} / {max(self.captions)}"
            lines.append(f"  captions  {captions:,}; per image least / mean / most: {spread}")
        for extension, count in self.members.most_common():
            lines.append(f"  members   .{extension:<12} {count:>10,}   mean {self.member_bytes[extension] / count:,.0f} bytes")
        if self.sizes:
            widths, heights = zip(*self.sizes, strict=True)
            lines.append(f"  images    {min(widths)}-{max(widths)} x {min(heights)}-{max(heights)} pixels in a sample of {len(self.sizes)}")
        lines.append(f"  problems  {len(self.problems):,}")
        lines += [f"    {p.shard} {p.key or '(shard)'}: {p.reason}" for p in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"    ... and {len(self.problems) - SHOWN:,} more")
        return "\n".join(lines)


def splits_below(uri: str) -> list[str]:
    """The split folders to look at. Raises ValueError when there is not one tar."""
    if uri.endswith(".tar") or files.list_files(uri, ".tar"):
        return [uri]
    if found := [folder for folder in files.list_folders(uri) if files.list_files(folder, ".tar")]:
        return found
    raise ValueError(f"no .tar in {uri} nor in a folder right below it")


def inspect(uri: str) -> Report:
    """Scan a split folder or one tar. What the manifest says otherwise is reported as a problem, too."""
    report = Report(uri)
    shards = [uri] if uri.endswith(".tar") else list_shards(uri)
    pool = ThreadPoolExecutor(8)  # reading and hashing release the GIL
    try:
        for receipt, inside, sizes in over(pool.map(_look, shards), "inspect", len(shards), "shard"):
            report.infos.append(receipt.info)
            report.receipts.append(receipt)
            report.problems += receipt.problems
            report.captions.update(row[1] for row in receipt.rows)
            report.sizes += sizes[: max(0, SIZED - len(report.sizes))]
            for extension, size in inside:
                report.members[extension] += 1
                report.member_bytes[extension] += size
    finally:
        pool.shutdown(cancel_futures=True)  # who stops it does not wait for all shards
    report.layout = _layout(report, uri)
    report.problems += _against_manifest(uri, report.infos)
    return report


def _look(uri: str) -> tuple[Receipt, list[tuple[str, int]], list[tuple[int, int]]]:
    """(receipt as packing would have written it, (extension, bytes) of each member, sizes of a few images)."""
    name, data = files.name_of(uri), files.read_bytes(uri)
    index, problems, sha256 = scan_bytes(data, name)
    inside: list[tuple[str, int]] = []
    sizes: list[tuple[int, int]] = []
    for member in _readable(memoryview(data)):
        extension = files.name_of(member.name).partition(".")[2].lower()
        inside.append((extension, member.size))
        if extension in ("jpg", "jpeg", "png", "webp") and len(sizes) < SIZED // 8:
            try:
                sizes.append(check_image(data[member.start : member.start + member.size]))
            except ValueError as error:
                problems.append(Problem(files.name_of(member.name).partition(".")[0], name, "inspect", str(error)))
    captions = sum(row.captions for row in index)
    info = ShardInfo(name=name, samples=len(index), captions=captions, bytes=len(data), sha256=sha256)
    rows = [(row.key, row.captions, row.start, row.end) for row in index]
    return Receipt(info=info, made_from="foreign", rows=rows, problems=problems), inside, sizes


def _readable(data: memoryview) -> Iterator[Member]:
    try:
        yield from (m for m in members(data) if isinstance(m, Member))
    except TarProblem:
        return  # already among the problems of the scan


def _layout(report: Report, uri: str) -> str:
    if not uri.endswith(".tar") and files.exists(files.join(uri, NAME)):
        return f"itm ({NAME})"
    if not uri.endswith(".tar") and files.exists(files.join(uri, "nshards.txt")):
        return "CLIP_benchmark retrieval (captions one a line in .txt)"
    if report.members["txt"] and report.members["json"]:
        return "img2dataset (image, .txt, .json)"
    if report.members[REGIONS] or report.members["json"]:
        return "itm members, without a manifest"
    return "WebDataset with .txt captions" if report.members["txt"] else "unknown: neither .json nor .txt captions"


def _against_manifest(uri: str, infos: list[ShardInfo]) -> list[Problem]:
    if uri.endswith(".tar") or not files.exists(files.join(uri, NAME)):
        return []
    promised = {info.name: info for info in read_manifest(uri).shards}
    problems = [
        Problem("", name, "inspect", "in the manifest, but not here", "shard") for name in promised.keys() - {i.name for i in infos}
    ]
    for info in infos:
        if info.name not in promised and info.samples:
            problems.append(Problem("", info.name, "inspect", "not in the manifest", "shard"))
        elif info.name in promised and info != promised[info.name]:
            problems.append(Problem("", info.name, "inspect", "differs from the manifest (samples, captions, bytes or sha256)", "shard"))
    return sorted(problems, key=lambda p: p.shard)


def _write_index(uri: str, report: Report) -> str:
    if files.exists(files.join(uri, NAME)):
        return f"  {NAME} is there already"
    for receipt in report.receipts:
        write_receipt(files.join(uri, receipt.info.name), receipt)
    rejected = sum(receipt.rejected for receipt in report.receipts)
    write_manifest(uri, Manifest(split=files.name_of(uri), source="foreign shards", shards=report.infos, rejected=rejected, format=FOREIGN))
    return f"  wrote {NAME} and {len(report.receipts):,} indexes"


if __name__ == "__main__":
    script(__file__)
