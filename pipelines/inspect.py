"""Say what a folder of shards, or of soft-label stores, holds. Reads any WebDataset of image-caption pairs.

    itm inspect /data/scenes                 every split below the folder
    itm inspect s3://bucket/coco/train       one split
    itm inspect shards/train/00003.tar       one shard
    itm inspect /data/img2dataset --index    also write manifest.json and an index beside each tar: later stages start at once
    itm inspect -c recipe.yaml               the raw data of data.source: what `itm pack` would reject, and nothing is written; where
                                             it names none, the shards below data.root
    itm inspect shards/train/teachers        all soft-label stores of a split side by side; also one store: its folder

Of shards: samples, captions, members, image sizes, problems. Every image and region file is decoded, --quick looks at a few of each shard
only. Of stores: entropy and mass off the diagonal of the soft labels by temperature, equal vectors, coverage, agreement, a suggested
temperature, and a page with the nearest neighbours of 20 samples. Exit code 1 when anything is wrong: samples or captions that would be
left out, shards that differ from their manifest, a store that is not whole, of other shards, or constant.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from itm.arguments import read_from, written_to
from itm.data import files
from itm.data.manifest import FOREIGN, NAME, Manifest, Receipt, ShardInfo, list_shards, write_manifest, write_receipt
from itm.data.pixels import Traits, traits
from itm.data.records import Problem, Record
from itm.data.same_image import bytes_of, image_of
from itm.data.shards import REGIONS, Sample, parse_range, read_manifest, scan_bytes
from itm.data.tar import Member, TarProblem, members
from itm.progress import over
from pipelines.cli import recipe_arguments, recipe_from, script

if TYPE_CHECKING:
    from itm.config import Recipe

QUICK = 8  # images of a shard that --quick decodes
SHOWN = 10  # problems printed by name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "uri", nargs="?", type=read_from, help="folder or URI: a root of splits, a split, a .tar, the stores of a split, or one store"
    )
    recipe_arguments(parser, required=False)
    parser.add_argument("--index", action="store_true", help="write manifest.json and indexes for shards made by other tools")
    parser.add_argument("--quick", action="store_true", help=f"decode {QUICK} images of each shard only")
    stores = parser.add_argument_group("soft-label stores")
    stores.add_argument(
        "--shards", metavar="URI", type=read_from, help="the split whose stores these are (default: where they lie, if there are shards)"
    )
    stores.add_argument("--batch", type=int, default=128, help="samples whose soft labels are made together (default: 128)")
    stores.add_argument("--seed", type=int, default=0, help="seed of the choice of samples (default: 0)")
    stores.add_argument(
        "--page", metavar="URI", type=written_to, help="where the page is written (default: neighbours.html in the folder that was given)"
    )


def run(args: argparse.Namespace) -> int:
    if getattr(args, "recipe", None):
        args.overrides = [*filter(None, [args.uri]), *args.overrides]
        recipe = recipe_from(args)
        if recipe.data.source is not None:
            return _inspect_source(recipe)
        args.uri, args.overrides = recipe.data.root, []
    if not args.uri or getattr(args, "overrides", []):
        raise ValueError("give one folder or URI of shards, or -c and a recipe")
    if not args.uri.endswith(".tar") and (found := _inspect_stores(args)) is not None:
        return found
    healthy = True
    for uri in splits_below(args.uri):
        report = inspect(uri, getattr(args, "quick", False))
        print(report.text())
        healthy &= not report.problems
        if args.index and not uri.endswith(".tar"):
            print(_write_index(uri, report))
    return 0 if healthy else 1


def _inspect_stores(args: argparse.Namespace) -> int | None:
    """None when the folder holds no stores."""
    from pipelines.teaching import inspection

    if not inspection.holds_stores(args.uri):
        return None
    if args.batch < 2:
        raise ValueError(f"--batch {args.batch}: soft labels need two samples")
    found = inspection.inspect(args.uri, args.shards, args.batch, args.seed)
    page = args.page or files.join(args.uri, inspection.PAGE)
    files.write_atomic(page, found.page.encode())
    print(f"{args.uri}\n{found.text()}\n  nearest neighbours of 20 samples: {page}")
    return 0 if found.healthy else 1


@dataclass
class Report:
    """What one split holds. looks: of decoded images; captions: how many samples have so many captions; images: what is equal for samples
    that show one image, and for equal files (`itm.data.same_image`), of each sample."""

    uri: str
    layout: str = ""
    infos: list[ShardInfo] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    captions: Counter[int] = field(default_factory=Counter)
    members: Counter[str] = field(default_factory=Counter)
    member_bytes: Counter[str] = field(default_factory=Counter)
    looks: list[Traits] = field(default_factory=list)
    images: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def text(self) -> str:
        samples, captions = sum(self.captions.values()), sum(n * times for n, times in self.captions.items())
        lines = [
            f"{self.uri}",
            f"  layout    {self.layout}",
        ]
        if self.infos:
            lines.append(f"  shards    {len(self.infos):,}, {sum(i.bytes for i in self.infos):,} bytes")
        lines.append(f"  samples   {samples:,}")
        if samples:
            spread = f"{min(self.captions)} / {captions / samples:.2f} / {max(self.captions)}"
            lines.append(f"  captions  {captions:,}; per image least / mean / most: {spread}")
        for extension, count in self.members.most_common():
            lines.append(f"  members   .{extension:<12} {count:>10,}   mean {self.member_bytes[extension] / count:,.0f} bytes")
        if self.looks:
            widths, heights = [look.width for look in self.looks], [look.height for look in self.looks]
            lines.append(f"  images    {min(widths)}-{max(widths)} x {min(heights)}-{max(heights)} pixels, {len(self.looks):,} decoded")
        lines += [f"  {name:<9} {count:,} {words}" for name, count, words in self._remarks() if count]
        lost = sum(p.what == "sample" for p in self.problems), sum(p.lost_captions for p in self.problems)
        lines.append(
            f"  problems  {len(self.problems):,}" + (f"; left out: {lost[0]:,} samples, {lost[1]:,} captions" if any(lost) else "")
        )
        lines += [f"    {p.shard} {p.key or '(shard)'}: {p.reason}" for p in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"    ... and {len(self.problems) - SHOWN:,} more")
        return "\n".join(lines)

    def _remarks(self) -> list[tuple[str, int, str]]:
        """What is no fault, and a reader should know: (name, count, words)."""
        users = Counter(key for receipt in self.receipts for key in {row[0] for row in receipt.rows})
        shown, equal = len({image for image, _ in self.images}), len({file for _, file in self.images})
        turned, clear = (sum(getattr(look, name) for look in self.looks) for name in ("turned", "transparent"))
        return [
            ("turned", turned, "by their EXIF orientation, unless data.exif=false"),
            ("clear", clear, "have a transparent layer: it is laid over white"),
            (
                "copies",
                len(self.images) - shown,
                "samples show an image of others (equal image_id, or for want of one equal bytes): joined",
            ),
            ("equal", shown - equal, "images are equal bytes under another image_id: negatives of each other"),
            ("keys", sum(n > 1 for n in users.values()), "are used by several shards: told apart as <shard>/<key>, renamed by itm repair"),
        ]


def splits_below(uri: str) -> list[str]:
    """The split folders to look at. Raises ValueError when there is not one tar."""
    if uri.endswith(".tar") or files.list_files(uri, ".tar"):
        return [uri]
    if found := [folder for folder in files.list_folders(uri) if files.list_files(folder, ".tar")]:
        return found
    raise ValueError(f"no .tar in {uri} nor in a folder right below it")


def inspect(uri: str, quick: bool = False) -> Report:
    """Scan a split folder or one tar. What the manifest says otherwise is reported as a problem, too. quick: decode `QUICK` a shard."""
    report = Report(uri)
    shards = [uri] if uri.endswith(".tar") else list_shards(uri)
    look = partial(_look, most=QUICK if quick else None)
    pool = ThreadPoolExecutor(8)  # reading and hashing release the GIL
    try:
        for shard in over(pool.map(look, shards), "inspect", len(shards), "shard"):
            report.infos.append(shard.receipt.info)
            report.receipts.append(shard.receipt)
            report.problems += shard.problems
            report.captions.update(row[1] for row in shard.receipt.rows)
            report.looks += shard.looks
            report.images += shard.images
            for extension, size in shard.inside:
                report.members[extension] += 1
                report.member_bytes[extension] += size
    finally:
        pool.shutdown(cancel_futures=True)  # who stops it does not wait for all shards
    report.layout = _layout(report, uri)
    report.problems += _against_manifest(uri, report.infos)
    return report


@dataclass(frozen=True)
class Shard:
    """What one tar holds: its receipt as packing would have written it, (extension, bytes) of each member, and all problems: those of the
    receipt, and what later stages would leave out."""

    receipt: Receipt
    inside: list[tuple[str, int]]
    looks: list[Traits]
    images: list[tuple[str, str]]
    problems: list[Problem]


def _look(uri: str, most: int | None) -> Shard:
    """most: images that are decoded; None = all."""
    name, data = files.name_of(uri), files.read_bytes(uri)
    index, problems, sha256 = scan_bytes(data, name)
    inside = [(files.name_of(m.name).partition(".")[2].lower(), m.size) for m in _readable(memoryview(data))]
    looks: list[Traits] = []
    images: list[tuple[str, str]] = []
    later: list[Problem] = []
    for number, row in enumerate(index):
        sample = parse_range(data[row.start : row.end], uri, row.start)
        images.append((image_of(sample), bytes_of(sample)))
        later += _wordless(sample, name)
        if most is None or number < most:
            faults = [_fault(what, check) for what, check in _checks(sample, looks)]
            if reason := "; ".join(filter(None, faults)):
                whole = None not in faults
                later.append(Problem(row.key, name, "inspect", reason, "sample" if whole else "member", row.captions if whole else 0))
    captions = sum(row.captions for row in index)
    info = ShardInfo(name=name, samples=len(index), captions=captions, bytes=len(data), sha256=sha256)
    rows = [(row.key, row.captions, row.start, row.end) for row in index]
    return Shard(Receipt(info=info, made_from="foreign", rows=rows, problems=problems), inside, looks, images, problems + later)


def _checks(sample: Sample, looks: list[Traits]) -> Iterator[tuple[str, Callable[[], object]]]:
    """What decodes each file of a sample; the looks of its image are added to `looks`."""
    image, regions = sample.image, sample.regions
    if image is not None:
        yield "image", lambda: looks.append(traits(image))
    if regions is not None:
        from itm.data.preprocess import read_regions  # with torch, which the command line must not wait for

        yield "regions", lambda: read_regions(regions, 1 << 16)


def _fault(what: str, check: Callable[[], object]) -> str | None:
    try:
        check()
    except ValueError as error:
        return f"{what}: {error}"
    return None


def _wordless(sample: Sample | Record, shard: str) -> Iterator[Problem]:
    """Captions that training and evaluation leave out where captions are cleaned."""
    for caption in sample.captions:
        if not any(map(str.isalnum, caption.text)):
            from itm.data.text import clean_caption

            try:
                clean_caption(caption.text)
            except ValueError as error:
                yield Problem(sample.key, shard, "inspect", f"caption {caption.id}: {error}", "caption")


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


def _inspect_source(recipe: Recipe) -> int:
    """The splits of `data.source`, each item made as packing makes it."""
    from pipelines.pack import Job, accepted, source_of

    source, part = source_of(recipe), recipe.data.source
    assert part is not None
    healthy = True
    for split in source.splits:
        problems: list[Problem] = []
        read: Counter[str] = Counter()
        report = Report(f"{split} of {part.kind}")
        for record in accepted(Job(part, split, recipe.data.image, "", "", 0, source.count(split)), problems, read):
            report.captions[len(record.captions)] += 1
            problems += _wordless(record, "") if recipe.text.clean else []
            if record.image is not None:
                report.looks.append(traits(record.image))
        report.layout = f"raw: {source.count(split):,} images, {read['captions']:,} captions read"
        report.problems = problems
        print(report.text())
        healthy &= not problems
    return 0 if healthy else 1


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
