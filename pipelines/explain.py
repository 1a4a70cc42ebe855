"""Why a matcher scores one pair as it does: where words look, relations, gates, edges, cut words, on one self-contained page.

    itm explain -c demo.yaml --pair 000017                          # an image of the test split and its first caption
    itm explain -c uarda-f30k --pair 1000092795 1000092795#3        # another of its captions, or one of another image
    itm explain --model runs/sgr/matcher --model runs/saf/matcher --shards data/shards/test --pair 000017
    itm explain --model runs/iais-off/matcher --model runs/iais/matcher --shards data/shards/test --pair 000017     # before and after
    itm explain -c demo.yaml --pair 000017 --json                   # the numbers behind the page

A pair is an image by its key, and a caption by its id: `itm evaluate` writes both, beside what was found for them, and `itm report`
shows them. What is shown depends on the matcher:

    where words look        scan, sgr, saf, uarda, uniter: each word's weights over regions or patches
    relation matrices       uniter, and from cosines scan, sgr, saf, uarda, dual: S_LL, S_VV, S_LV, S_VL, S_VV in the words' places, ISD
    gates of the words      saf: the share of each word, and of the whole pair, in the vector that the score is read from
    edges                   sgr: what each node takes of each node, step by step
    cut words               uarda: each word's best similarity, and which words stay below the threshold

The page says in a line each what a matcher cannot show, and why. Several --model stand side by side, their matrices on one scale.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from itm.arguments import read_from, written_to
from itm.device import HELP
from pipelines.cli import recipe_arguments, recipe_from, script

if TYPE_CHECKING:
    from itm.data.formats import Json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser, required=False)
    parser.add_argument(
        "--pair", nargs="+", required=True, metavar="KEY", help="an image's key, then the id of a caption (default: the image's first one)"
    )
    parser.add_argument(
        "--model",
        "--matcher",
        type=read_from,
        action="append",
        metavar="URI",
        help="matcher folder, models:/name@alias or runs:/...; several stand side by side (default: what the recipe trained)",
    )
    parser.add_argument(
        "--shards", metavar="URI", type=read_from, help="folder of the split that holds the pair (default: that of the recipe)"
    )
    parser.add_argument("--split", help="which split of the recipe (default: data.test_split)")
    parser.add_argument(
        "--output", metavar="HTML", type=written_to, help="where the page goes (default: explain-KEY.html in the run's folder, or here)"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, and write no page unless --output names it")
    parser.add_argument("--device", default="auto", help=HELP)


def run(args: argparse.Namespace) -> None:
    from itm.data import files

    recipe = recipe_from(args) if args.recipe else None
    if len(args.pair) > 2:
        raise ValueError(f"--pair takes an image's key and a caption's id, not {len(args.pair)} words: name options before it, or after --")
    if recipe is None and not (args.model and args.shards):
        raise ValueError("say what to explain: -c RECIPE, or --model URI --shards FOLDER")
    models = args.model or ((recipe.evaluation.ensemble or [files.join(recipe.folder, "matcher")]) if recipe else [])
    shards = args.shards or (files.join(recipe.data.root, args.split or recipe.data.test_split) if recipe else "")
    told, page = explain(models, shards, *args.pair, allow=recipe.allowed if recipe else args.allow, device=args.device)
    if args.json:
        print(json.dumps(told, indent=1))
    if args.output or not args.json:
        name = f"explain-{''.join(c if c.isalnum() or c in '-_.' else '-' for c in '-'.join(args.pair))}.html"
        output = args.output or (files.join(recipe.folder, name) if recipe else name)
        files.write_atomic(output, page.encode())
        if not args.json:
            print(output)


def explain(
    models: Sequence[str], shards: str, image: str, caption: str | None = None, *, allow: Sequence[str] = (), device: str = "auto"
) -> tuple[Json, str]:
    """The numbers and the page. Raises ValueError for a model, split, image or caption that is not there, or cannot be read."""
    import itm
    from itm.data import files
    from itm.device import resolve_device
    from itm.report.explain_page import PHOTO, render_pair
    from itm.report.pair import FORMAT, explained, find_pair
    from itm.report.thumbnails import data_uri
    from pipelines.reporting.pictures import named

    where, place = resolve_device(device), files.absolute(shards)
    pair = find_pair(place, image, caption)
    matchers = named({uri: itm.load_matcher(uri, allow=allow) for uri in models})
    about = {"image": pair.image.key, "shard": pair.shard, "caption": pair.caption.id, "text": pair.caption.text, "own": pair.own}
    told: Json = {"format": FORMAT, "shards": shards, "pair": about}
    told["models"] = {name: explained(matcher, pair, where) for name, matcher in matchers.items()}
    return told, render_pair(told, data_uri(pair.image.image, PHOTO) if pair.image.image else "")


if __name__ == "__main__":
    script(__file__)
