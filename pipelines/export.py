"""Write what itm made in a form that others read: soft-label stores for other trainers, matchers for other runtimes.

    itm export teachers data/shards/train --to parquet -o exported            # every finished store of the split, one file a shard
    itm export teachers data/shards/train --to npy -o exported                # CUSA's own form
    itm export teachers data/shards/train --to webdataset -o exported/train   # the shards again, each sample with its vectors
    itm export matcher models:/clip@champion --to huggingface -o clip-hf      # a folder that transformers loads
    itm export matcher runs/demo/matcher --to onnx -o demo-onnx               # image.onnx and text.onnx

docs/exporting.md shows the few lines that train elsewhere from each.
"""

from __future__ import annotations

import argparse

from itm.arguments import read_from, written_to
from itm.extras import needed_by
from pipelines.cli import allow_argument, script

TEACHERS, MATCHERS = ("parquet", "npy", "webdataset"), ("huggingface", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("teachers", "matcher"), help="soft-label stores, or a matcher")
    parser.add_argument(
        "uri", type=read_from, help="teachers: the folder or URI of a split's shards; matcher: a folder, or models:/name@alias"
    )
    parser.add_argument("--to", required=True, choices=(*TEACHERS, *MATCHERS), help=f"teachers: {', '.join(TEACHERS)}; matcher: the others")
    parser.add_argument("-o", "--output", required=True, type=written_to, help="folder or URI to write to (matcher: a local folder)")
    parser.add_argument("--teacher", action="append", default=[], metavar="ID", help="only this store, by its folder's name (repeatable)")
    parser.add_argument("--stores", metavar="URI", type=read_from, help="where the stores lie (default: <split>/teachers)")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="numbers of exported vectors (default: fp32)")
    allow_argument(parser)


def run(args: argparse.Namespace) -> None:
    mine = TEACHERS if args.what == "teachers" else MATCHERS
    if args.to not in mine:
        raise ValueError(f"`itm export {args.what}` writes {' or '.join(mine)}, not {args.to}")
    (_teachers if args.what == "teachers" else _matcher)(args)


def _teachers(args: argparse.Namespace) -> None:
    from itm.data import files
    from itm.exporters.teachers import export_stores, finished_stores

    stores = finished_stores(args.stores or files.join(args.uri, "teachers"), args.teacher)
    for done in export_stores(args.to, stores, args.uri, args.output, args.dtype):
        print(f"{done.uri}: {done.vectors:,} vectors, {done.without:,} rows without one")


def _matcher(args: argparse.Namespace) -> None:
    import itm
    from itm.exporters.matcher import export_matcher

    matcher = itm.load_matcher(args.uri, allow=args.allow)
    with needed_by("itm export --to onnx", extra="onnx"):
        print(export_matcher(args.to, matcher, args.output))


if __name__ == "__main__":
    script(__file__)
