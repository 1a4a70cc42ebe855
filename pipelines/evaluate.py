"""Recall and equivalence metrics of a matcher on a split of shards, or of a score file that any other code wrote.

    itm evaluate -c demo.yaml                                  # the matcher that `itm train` left in <output>/<name>/matcher
    itm evaluate -c demo.yaml --split val --matcher models:/itm-matcher@champion
    itm evaluate -c coco.yaml --protocol coco-1k-5fold
    itm evaluate -c sgraf-f30k                                 # an ensemble: the mean of the scores of evaluation.ensemble
    itm evaluate -c sgr-f30k --matcher runs/sgr-f30k/matcher --matcher runs/saf-f30k/matcher     # the same
    itm evaluate -c sgr-f30k --matcher models:/sgraf-f30k@champion      # the same, registered as one matcher, or its folder
    itm evaluate --model openai/clip-vit-base-patch32 --shards data/shards/test      # zero-shot, without a recipe
    itm evaluate --model openai/clip-vit-base-patch32 --model models:/itm-matcher@champion --shards data/shards/test     # side by side
    itm evaluate --scores scores.npy --truth ids.json          # (images, captions) scores of a foreign model
    itm evaluate -c mine.yaml --protocol positives --table pairs.csv      # pairs that hold, one or many a query
    itm evaluate -c cusa-clip-b32-f30k --protocol image-retrieval --shards data/image-sets/test       # labelled images
    itm evaluate -c cusa-clip-b32-f30k --protocol senteval --pairs SentEval/data/downstream
    itm evaluate --protocol sts --pairs sts-test.tsv --matcher models:/itm-matcher@champion      # likeness of sentences

Protocols: auto (all images x all captions), flickr30k-1k, coco-5k, coco-1k-5fold, eccv, cxc, positives, winoground, i2i, t2t; of the
matcher and not of its scores: image-retrieval, sts, senteval, sts12 to sts16, isd and isda (relations among words and among regions);
one of your own: package.module:Name. The truth file is a JSON object
{"image_ids": [...], "caption_ids": [...], "caption_image_ids": [...]}, in the order of the rows and columns of the scores.
The result goes to <output>/<name>/evaluation.json and to the MLflow run of the training. Running it again changes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from itm.arguments import read_from, written_to
from itm.evaluation import TIES
from pipelines.cli import recipe_arguments, recipe_from, script
from pipelines.on_ray.options import IN_MEMORY, How
from pipelines.on_ray.options import add_arguments as add_scoring_arguments

if TYPE_CHECKING:
    from itm.config import Recipe
    from itm.data.formats import Json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser, required=False)
    parser.add_argument(
        "--matcher",
        "--model",
        action="append",
        type=read_from,
        metavar="URI",
        help="matcher folder, models:/name@alias, runs:/... or a CLIP or SigLIP of Hugging Face (default: what the recipe trained); "
        "several: with a recipe an ensemble, the mean of scores; with --shards side by side",
    )
    about = "folder of a split: evaluate the matchers on it, without a recipe; image-retrieval: also with one"
    parser.add_argument("--shards", metavar="URI", type=read_from, help=about)
    parser.add_argument("--split", help="which split (default: data.test_split)")
    parser.add_argument("--protocol", metavar="NAME", help="one of the above (default: evaluation.protocol of the recipe)")
    parser.add_argument("--tie", choices=TIES, default="pessimistic", help="how equal scores are ordered")
    add_scoring_arguments(parser)
    parser.add_argument(
        "--save-scores", metavar="NPY", type=written_to, help="also write the (images, captions) scores, and <NPY>.ids.json"
    )
    parser.add_argument("--scores", metavar="NPY", type=read_from, help="evaluate this score file instead of a matcher")
    about = "positives: table of the pairs that hold, of image and caption keys"
    parser.add_argument("--table", metavar="FILE", type=read_from, help=about)
    parser.add_argument("--truth", metavar="JSON", type=read_from, help="the ids that belong to --scores")
    about = "where the result of --scores, or of --pairs alone, goes (default: beside them)"
    parser.add_argument("--output", metavar="JSON", type=written_to, help=about)
    about = "sts: files of two sentences and a rating (STS-B, SICK, any CSV or TSV); senteval, sts12 to sts16: SentEval's folder"
    parser.add_argument("--pairs", metavar="FILE", nargs="+", type=read_from, help=about)
    parser.add_argument("--pair-columns", metavar="A,B,RATING", help="sts: headers, or column numbers from 1 (default: found out)")


def run(args: argparse.Namespace) -> int:
    from pipelines.evaluating.result import flow_line, table
    from pipelines.on_ray.scoring import described

    if args.table:
        if args.protocol not in (None, "positives") or not (args.recipe or args.scores):
            raise ValueError("--table is the pairs of --protocol positives; it goes with -c RECIPE or --scores FILE")
        args.protocol = "positives"
        args.overrides = [*args.overrides, f"evaluation.options.positives.table={json.dumps(args.table)}"]
    if args.shards and args.matcher and not args.recipe and not _asks_the_matcher(args.protocol):
        from pipelines.evaluating.side_by_side import compare, shown

        print(shown(compare(args.matcher, args.shards, args.protocol or "auto", args.tie, How.of(args), args.allow, args.output)))
        return 0
    if args.scores:
        result = evaluate_scores(args.scores, args.truth, args.protocol or "auto", args.tie, args.output, args.table)
    else:
        result = _of_matcher(args)
    print("\n".join(filter(None, (table(result), described(result), flow_line(result)))))
    return 0


def _asks_the_matcher(name: str | None) -> bool:
    from itm.evaluation import PROTOCOLS
    from itm.evaluation.protocols import MatcherProtocol
    from itm.kinds import find_part

    return name is not None and issubclass(find_part(PROTOCOLS, name, "protocol"), MatcherProtocol)


def _of_matcher(args: argparse.Namespace) -> Json:
    from itm.evaluation.protocols import MatcherProtocol, find_protocol
    from pipelines.evaluating.matcher_protocols import probe

    recipe = recipe_from(args) if args.recipe else None
    if name := args.protocol or (recipe.evaluation.protocol if recipe else ""):
        protocol = find_protocol(name, recipe.evaluation.options.get(name) if recipe else None)
        if isinstance(protocol, MatcherProtocol):
            return probe(args, recipe, name, protocol)
    if args.shards:
        raise ValueError("--shards names the split where there is no recipe; with -c the split is data.root and --split")
    if recipe is None:
        raise ValueError("say what to evaluate: -c RECIPE, --model URI --shards FOLDER, or --scores FILE.npy --truth IDS.json")
    options = {"protocol": args.protocol, "tie": args.tie, "how": How.of(args), "save_scores": args.save_scores}
    return evaluate(recipe, args.matcher, args.split, **options)


def evaluate(
    recipe: Recipe,
    matcher_uri: str | Sequence[str] | None = None,
    split: str | None = None,
    *,
    protocol: str | None = None,
    tie: str = "pessimistic",
    how: How = IN_MEMORY,
    save_scores: str | None = None,
) -> Json:
    """Evaluate and write `evaluation*.json` below the recipe's folder; returns its content (`metrics`, `chance`, `counts`, ...).

    Several matchers are an ensemble, whose score is the mean of theirs.
    Raises ValueError for a split that cannot be read, too many rejected samples, NaN scores, or a protocol that does not fit.
    """
    from pipelines.evaluating import driver

    return driver.evaluate(recipe, matcher_uri, split, protocol=protocol, tie=tie, how=how, save_scores=save_scores)


def evaluate_scores(
    scores: str,
    truth: str | None,
    protocol: str = "auto",
    tie: str = "pessimistic",
    output: str | None = None,
    table: str | None = None,
) -> Json:
    """Evaluate a .npy score matrix (images, captions) of any origin; the truth file holds the ids of its rows and columns.

    table: the pairs that hold, for the protocol `positives`.
    """
    from pipelines.evaluating import score_file

    return score_file.evaluate_scores(scores, truth, protocol, tie, output, {"table": table} if table else None)


if __name__ == "__main__":
    script(__file__)
