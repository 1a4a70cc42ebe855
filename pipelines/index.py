"""Vectors of shards, kept for searching: every image and caption encoded once by a matcher, one Arrow file a shard.

    itm index --model models:/itm-matcher@champion --shards data/shards/test
    itm index --model runs/clip/matcher --shards data/shards/train data/shards/test --output data/index --dtype int8
    itm index --model runs/clip/matcher --photos ~/Pictures --output data/album
    itm index --model runs/clip/matcher --output data/index --add
    itm index --model runs/clip/matcher --output data/index --remove keys.txt
    itm index --model runs/clip/matcher --shards data/shards/train --faiss recall=.95
    itm index --model runs/clip/matcher --shards data/shards/train data/shards/test --output data/index --report data/index-report
    itm index --model runs/scan/matcher --shards data/shards/test --screen own --loss .01
    itm index --model runs/scan/matcher --shards data/shards/test --screen centroids
    itm search "two dogs" --model runs/clip/matcher --shards data/shards/test --index data/index

--photos takes a folder of photos as people keep them, with or without captions, and packs it to <output>/shards first. Shards that were
encoded are kept, so it can be stopped at any time and run again: the index ends with the same bytes. With --add the shards that are new, or
were changed, are encoded, and those that are gone are not found any more; nothing else is done again. --remove takes images out by their
keys: nothing is written but index.json, and their vectors lie in the files until their shard is packed without them and encoded again; only
--overwrite forgets which they are. --part K/N encodes a share of the
shards, so that N machines can work on one --output, or on one each, which --merge then puts together. What cannot be read is listed in
quarantine.jsonl. index.json is written last.

A search compares with every vector, exactly. Of matchers that score pairs, --screen scores only candidates: --loss says how many hits that
may cost, and the number of candidates is the least that was measured to keep it. --faiss (extra `faiss`) proposes candidates in less than a
pass over all vectors; the share of the best ten that it finds is measured, too.

--report writes a page each about images that are nearly the same (over several splits: leakage), images that no caption finds or that crowd
out others, and captions that fit another image better than their own.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from itm.arguments import read_from, written_to
from itm.device import HELP
from pipelines.cli import allow_argument, script

if TYPE_CHECKING:
    from itm.retrieval.store import Catalogue
    from pipelines.indexing.building import Wanted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=read_from, help="models:/name@alias, models:/name/version or a matcher folder")
    parser.add_argument("--shards", nargs="+", default=[], type=read_from, metavar="URI", help="folders of splits")
    parser.add_argument("--photos", type=read_from, metavar="FOLDER", help="a plain folder of photos, which is packed first")
    parser.add_argument("--output", type=written_to, help="where the index goes (default: index in the folder of the one split)")
    parser.add_argument("--dtype", choices=("fp16", "int8", "fp32"), default="fp16", help="how vectors are stored (default fp16)")
    parser.add_argument("--keep", nargs="*", metavar="FIELD", help="fields of samples to filter by (default: all flat ones)")
    parser.add_argument("--add", action="store_true", help="encode what is new or changed in the splits that were indexed, or are named")
    parser.add_argument("--remove", type=read_from, metavar="FILE", help="images that are not to be found any more: their keys, one a line")
    parser.add_argument("--overwrite", action="store_true", help="delete an index of other choices, then make this one")
    parser.add_argument("--part", metavar="K/N", help="encode the K-th of N shares of the shards")
    parser.add_argument("--merge", nargs="+", default=[], type=read_from, metavar="URI", help="indexes, also parts, to take vectors from")
    parser.add_argument("--workers", type=int, default=0, help="Ray actors that encode (default 0: in this process)")
    parser.add_argument("--batch-size", type=int, default=64, help="images encoded at once (default 64)")
    parser.add_argument("--device", default="auto", help=HELP)
    parser.add_argument(
        "--screen",
        metavar="URI",
        type=read_from,
        help="first stage of a matcher that scores pairs: own, centroids, or URI of a dual encoder",
    )
    parser.add_argument("--loss", type=float, default=0.01, help="share of hits that the first stage may lose (default .01)")
    parser.add_argument("--faiss", metavar="recall=R", help="also a structure of faiss that finds this share of the best ten")
    parser.add_argument("--sample", type=int, default=1000, help="questions that --screen and --faiss are measured on (default 1000)")
    parser.add_argument("--report", type=written_to, metavar="FOLDER", help="pages about duplicates, reach and captions")
    parser.add_argument("--alike", type=float, default=0.97, help="cosine from which images are near duplicates (default .97)")
    allow_argument(parser)


def run(args: argparse.Namespace) -> None:
    wanted, recall = wanted_of(args), recall_of(args.faiss)
    only_removes = args.remove and not wanted.shards and not wanted.add
    catalogue = None if only_removes else index(wanted)
    if args.remove and (only_removes or catalogue is not None):
        catalogue = removed(wanted, args.remove)
    if catalogue is None:
        return
    print(f"{flow_line(catalogue)}; {wanted.output}")
    if args.screen or recall is not None:
        from pipelines.indexing.settings import Chosen, settle

        for line in settle(wanted, catalogue, Chosen(args.screen, args.loss, args.sample, recall)):
            print(line)
    if args.report:
        from itm.retrieval.index import Index
        from pipelines.indexing.auditing import audit

        for line in audit(Index.open(wanted.output), args.report, args.alike):
            print(line)


def kept(args: argparse.Namespace) -> str:
    """What a stage that is stopped leaves behind."""
    from itm.data import files

    output = output_of(args)
    whole = sum(len(files.list_files(folder, ".captions.arrow")) for folder in files.list_folders(output))
    return f"the vectors of {whole:,} shards are kept in {output}"


def wanted_of(args: argparse.Namespace) -> Wanted:
    """Raises ValueError for arguments that do not go together."""
    from itm.data import files
    from pipelines.indexing.building import Wanted

    output = output_of(args)
    shards = [*args.shards, *(packed_photos(args.photos, files.join(output, "shards")) if args.photos else ())]
    return Wanted(
        model=args.model,
        shards=tuple(shards),
        output=output,
        dtype=args.dtype,
        fields=None if args.keep is None else tuple(args.keep),
        batch_size=args.batch_size,
        device=args.device,
        workers=args.workers,
        add=args.add,
        overwrite=args.overwrite,
        part=part_of(args.part),
        merge=tuple(args.merge),
        allow=tuple(args.allow),
    )


def packed_photos(photos: str, root: str) -> list[str]:
    """The folders of the splits, packed below `root`; what was added to the photos since goes to new shards.

    Raises ValueError as `itm pack`, and for a folder without a photo.
    """
    from itm.config import parse_recipe
    from itm.data import files
    from pipelines.pack import pack

    data = {"root": root, "source": {"kind": "imagefolder", "options": {"path": photos}}, "max_reject_rate": 1.0}
    recipe = parse_recipe({"name": "photos", "output": root, "data": data, "model": {"kind": "dual"}})
    return [files.join(root, split) for split in pack(recipe)]


def output_of(args: argparse.Namespace) -> str:
    """Where the index goes. Raises ValueError where nobody says."""
    from itm.data import files

    if args.output is None and (args.photos or len(args.shards) != 1):
        raise ValueError("say where the index goes, --output FOLDER: only that of one split goes to its own folder by default")
    return str(args.output or files.join(args.shards[0], "index"))


def part_of(said: str | None) -> tuple[int, int]:
    """K/N as two numbers. Raises ValueError."""
    if said is None:
        return 1, 1
    number, slash, of = said.partition("/")
    if not (slash and number.isdigit() and of.isdigit()):
        raise ValueError(f"--part {said} is no share: say K/N, e.g. 1/4")
    return int(number), int(of)


def recall_of(said: str | None) -> float | None:
    """recall=R as a number. Raises ValueError."""
    if said is None:
        return None
    name, _, value = said.partition("=")
    try:
        if name != "recall":
            raise ValueError
        return float(value)
    except ValueError:
        raise ValueError(f"--faiss {said} is not understood: say --faiss recall=.95") from None


def index(wanted: Wanted) -> Catalogue | None:
    """Make (or complete) an index; None while shards of other parts are missing. Raises ValueError as `build`."""
    from pipelines.indexing.building import build

    return build(wanted)


def removed(wanted: Wanted, keys: str) -> Catalogue:
    """The index without the images whose keys a file lists. Raises ValueError as `remove`."""
    import itm
    from pipelines.indexing.removing import remove

    matcher = itm.load_matcher(wanted.model, allow=wanted.allow) if isinstance(wanted.model, str) else wanted.model
    return remove(wanted.output, matcher, keys)


def flow_line(catalogue: Catalogue) -> str:
    """What is in an index, as the last line of the stage states it."""
    entries = [entry for split in catalogue.splits for entry in split.shards]
    here = [entry for entry in entries if not entry.gone]
    images, captions, rejected = (sum(getattr(e, name) for e in here) for name in ("images", "captions", "rejected"))
    removed = sum(len(entry.removed) for entry in here)
    captions -= sum(count for entry in here for count in entry.removed.values())
    gone = sum(entry.images for entry in entries if entry.gone)
    lost = f", {gone:,} of shards that are gone" if gone else ""
    parts = [f"{images - removed:,} indexed", f"{rejected:,} rejected", *([f"{removed:,} removed"] if removed else [])]
    return f"{images + rejected:,} images = {' + '.join(parts)}, {captions:,} captions in {len(here)} shards{lost}"


if __name__ == "__main__":
    script(__file__)
