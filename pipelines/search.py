"""Search a sharded set with a matcher: text -> images or captions, image -> captions or images.

    itm search "a red circle left of a blue square" --model models:/itm-matcher@champion --shards data/shards/test -k 5
    itm search --image photo.jpg --model runs/demo/demo/matcher --shards data/shards/test
    itm search "two dogs" --model models:/itm-matcher@champion --shards data/shards/test --html hits.html
    itm search "two dogs" --find captions --model runs/demo/demo/matcher --shards data/shards/test
    itm search --image photo.jpg --find images --model runs/demo/demo/matcher --shards data/shards/test

--model is a matcher folder or a URI of the registry, --shards the folder of a split. The first search encodes the split and keeps the
result below --index (default <shards>/index), one Arrow file for each pair of weights and manifest; later ones read it. Matchers that
score pairs (late interaction, joint encoders) have no vector to keep: their encoded parts are kept and every pair is scored exactly.
An index that `itm index` made is smaller, is not read whole, spans several splits and can be filtered (`--where split=test`).
Texts are compared with captions, and images with images, by cosine: of the uni-modal heads where the matcher has some, else of its vectors.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from itm.arguments import read_from, written_to
from itm.device import HELP
from pipelines.cli import allow_argument, script

if TYPE_CHECKING:
    from typing import Unpack

    from itm.data.formats import Json
    from itm.retrieval.engine import Find, Hits, Place
    from itm.types import Matcher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", help="what to look for")
    parser.add_argument("--image", type=read_from, help="look for the captions of this image file instead")
    parser.add_argument("--find", choices=("images", "captions"), help="what to find (default: images for a text, captions for an image)")
    parser.add_argument("--model", required=True, type=read_from, help="models:/name@alias, models:/name/version or a matcher folder")
    parser.add_argument("--shards", type=read_from, help="folder or URI of a split (not needed with an --index of `itm index`)")
    allow_argument(parser)
    parser.add_argument("-k", type=int, default=5, help="how many answers (default 5)")
    parser.add_argument("--index", type=written_to, help="made by itm index, else where encoded splits are kept (default <shards>/index)")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only images that pass (may be repeated)")
    parser.add_argument("--rerank", type=int, metavar="K", help="score exactly only the K best by vectors (default: as the index says)")
    parser.add_argument("--device", default="auto", help=HELP)
    parser.add_argument("--html", type=written_to, help="also write a page with the images")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    if (args.text is None) == (args.image is None):
        raise ValueError('give either a text or --image, e.g. itm search "a red circle" --model ... --shards ...')
    model = args.model
    if args.allow:
        import itm

        model = itm.load_matcher(args.model, allow=args.allow)
    place = {"index": args.index, "device": args.device, "rerank": args.rerank, "where": filters(args.where)}
    found = search(args.text, image=args.image, model=model, shards=args.shards, k=args.k, find=args.find, **place)
    print(json.dumps(said(found), indent=1) if args.json else found)
    if args.html:
        from itm.data import files

        files.write_atomic(args.html, page(found).encode())


def filters(given: list[str]) -> dict[str, list[str]]:
    """COLUMN=VALUE pairs; values of one column are alternatives. Raises ValueError."""
    found: dict[str, list[str]] = {}
    for pair in given:
        column, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--where {pair} is no filter: say COLUMN=VALUE, e.g. split=test, key=2024*, width=640..1920")
        found.setdefault(column, []).append(value)
    return found


def said(found: Hits) -> Json:
    """The answers as JSON has them; what an answer has not is left out."""
    told = asdict(found)
    for hit in told["hits"]:
        del hit["caption_ids"]
        for name in ("metadata", "probability"):
            if not hit[name] and hit[name] != 0:
                del hit[name]
    return told


def search(
    text: str | None = None,
    *,
    model: str | Matcher,
    shards: str | None = None,
    image: str | None = None,
    k: int = 5,
    find: Find | None = None,
    **place: Unpack[Place],
) -> Hits:
    """The k best images for `text`, or the k best captions for the file `image`; `find` asks for the other kind of answer.

    Raises ValueError as `itm.retrieval.engine.search`.
    """
    from itm.retrieval import engine

    return engine.search(text, model=model, shards=shards, image=image, k=k, find=find, **place)


def page(found: Hits) -> str:
    """A self-contained HTML page: question, then each answer with its image, score and captions."""
    pictures, title = _pictures(found), html.escape(found.question)
    figures = []
    for hit in found.hits:
        words = "<br>".join(map(html.escape, (hit.key, *hit.captions)))
        image = f'<img src="{pictures.get((hit.shard, hit.key), "")}" alt="{html.escape(hit.key)}">'
        figures.append(f"<figure>{image}<figcaption><b>{hit.rank}. {hit.score:.4f}</b> {words}</figcaption></figure>")
    style = "body{font:15px sans-serif;margin:2em}figure{display:inline-block;width:240px;margin:8px;vertical-align:top}img{max-width:100%}"
    head = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return f"{head}<h1>{title}</h1><p>{html.escape(found.searched)}</p>{''.join(figures)}"


def _pictures(found: Hits) -> dict[tuple[str, str], str]:
    """(shard, key) -> data URI, for the images that the shards hold."""
    from itm.data.manifest import full_key
    from itm.data.shards import Sample, read_samples

    wanted = {(hit.shard, hit.key) for hit in found.hits}
    pictures: dict[tuple[str, str], str] = {}
    for shard in {shard for shard, _ in wanted}:
        for sample in read_samples(shard):
            if not isinstance(sample, Sample) or not sample.image:
                continue
            if shown := wanted & {(shard, sample.key), (shard, full_key(shard, sample.key))}:
                kind = {b"\x89P": "png", b"RI": "webp"}.get(sample.image[:2], "jpeg")
                pictures |= dict.fromkeys(shown, f"data:image/{kind};base64,{base64.b64encode(sample.image).decode()}")
    return pictures


if __name__ == "__main__":
    script(__file__)
