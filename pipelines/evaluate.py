"""Recall and equivalence metrics of a matcher on a split of shards, or of a score file that any other code wrote.

    itm evaluate -c demo.yaml                                  # the matcher that `itm train` left in <output>/<name>/matcher
    itm evaluate -c demo.yaml --split val --matcher models:/itm-matcher@champion
    itm evaluate -c coco.yaml --protocol coco-1k-5fold
    itm evaluate -c sgraf-f30k                                 # an ensemble: the mean of the scores of evaluation.ensemble
    itm evaluate -c sgr-f30k --matcher runs/sgr-f30k/matcher --matcher runs/saf-f30k/matcher     # the same
    itm evaluate --scores scores.npy --truth ids.json          # (images, captions) scores of a foreign model
    itm evaluate --protocol sts --pairs sts-test.tsv --matcher models:/itm-matcher@champion      # likeness of sentences

Protocols: auto (all images x all captions), flickr30k-1k, coco-5k, coco-1k-5fold, eccv, cxc, i2i, t2t; of the matcher and not of its
scores: sts, isd and isda (relations among words and among regions). The truth file is a JSON object
{"image_ids": [...], "caption_ids": [...], "caption_image_ids": [...]}, in the order of the rows and columns of the scores.
The result goes to <output>/<name>/evaluation.json and to the MLflow run of the training. Running it again changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import itm
from itm.config import Recipe
from itm.data import files
from itm.data.manifest import CHANGED, check_present
from itm.data.shards import Manifest, read_manifest
from itm.distributed import own_device
from itm.evaluation.dataset import EncodedSplit, Names, checked, encode_shard, exact_relevance, names_of, shards_of
from itm.evaluation.metrics import TIES
from itm.evaluation.protocols import PROTOCOLS, Scored, run_protocol
from pipelines.cli import recipe_arguments, recipe_from
from pipelines.evaluating.matcher_protocols import PROBES, probe
from pipelines.evaluating.matcher_protocols import add_arguments as add_probe_arguments
from pipelines.evaluating.result import FORMAT, absolute, content, output_of, stored, table, track, weights_hash
from pipelines.on_ray.scoring import IN_MEMORY, How, described, notes, score_split
from pipelines.on_ray.scoring import add_arguments as add_scoring_arguments

# Below this many captions one process is done before workers have imported torch.
IN_PROCESS_CAPTIONS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser, required=False)
    parser.add_argument(
        "--matcher",
        action="append",
        help="matcher folder or models:/name@alias (default: what the recipe's training wrote); several: an ensemble, mean of scores",
    )
    parser.add_argument("--split", help="which split (default: data.test_split)")
    parser.add_argument("--protocol", choices=(*PROTOCOLS, *PROBES), help="default: evaluation.protocol of the recipe")
    parser.add_argument("--tie", choices=TIES, default="pessimistic", help="how equal scores are ordered")
    add_scoring_arguments(parser)
    parser.add_argument("--save-scores", metavar="NPY", help="also write the (images, captions) scores, and <NPY>.ids.json")
    parser.add_argument("--scores", metavar="NPY", help="evaluate this score file instead of a matcher")
    parser.add_argument("--truth", metavar="JSON", help="the ids that belong to --scores")
    parser.add_argument("--output", metavar="JSON", help="where the result of --scores, or of --pairs alone, goes (default: beside them)")
    add_probe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.scores:
        result = evaluate_scores(args.scores, args.truth, args.protocol or "auto", args.tie, args.output)
    elif args.protocol in PROBES:
        result = probe(args, recipe_from(args) if args.recipe else None)
    elif not args.recipe:
        raise ValueError("say what to evaluate: -c RECIPE, or --scores FILE.npy --truth IDS.json")
    else:
        options = {"protocol": args.protocol, "tie": args.tie, "how": How.of(args), "save_scores": args.save_scores}
        result = evaluate(recipe_from(args), args.matcher, args.split, **options)
    print("\n".join(filter(None, (table(result), described(result)))))
    return 0


def evaluate(
    recipe: Recipe,
    matcher_uri: str | Sequence[str] | None = None,
    split: str | None = None,
    *,
    protocol: str | None = None,
    tie: str = "pessimistic",
    how: How = IN_MEMORY,
    save_scores: str | None = None,
) -> dict[str, Any]:
    """Evaluate and write `evaluation*.json` below the recipe's folder; returns its content (`metrics`, `chance`, `counts`, ...).

    Several matchers are an ensemble, whose score is the mean of theirs.
    Raises ValueError for a split that cannot be read, too many rejected samples, NaN scores, or a protocol that does not fit.
    """
    split, protocol = split or recipe.data.test_split, protocol or recipe.evaluation.protocol
    split_uri = absolute(files.join(recipe.data.root, split))
    uris = [matcher_uri] if isinstance(matcher_uri, str) else list(matcher_uri or [])
    members = uris or recipe.evaluation.ensemble or [files.join(recipe.folder, "matcher")]
    matchers = [itm.load_matcher(uri) for uri in members]
    screener = itm.load_matcher(how.screen_matcher) if how.screen and how.screen_matcher else None
    manifest = read_manifest(split_uri)
    output = how.named(output_of(recipe, uris, split, protocol))
    identity = {
        "format": FORMAT,
        "split": split,
        "split_hash": manifest.fingerprint(),
        "matcher_hash": "+".join(map(weights_hash, matchers)),
        "protocol_name": protocol,
        "tie": tie,
    } | how.identity(weights_hash(screener) if screener else None)
    if not save_scores and (done := stored(output, identity)):
        return done
    started = time.perf_counter()
    check_present(split_uri, manifest)
    files.remove_abandoned(recipe.folder)
    seen = [encode(matcher, split_uri, manifest, recipe) for matcher in matchers]
    screen = encode(screener, split_uri, manifest, recipe) if screener else None
    encoded = agreed([*seen, screen] if screen else seen, split_uri)
    flow = flow_of(encoded, split_uri, manifest)
    scored = score(matchers, seen, manifest, recipe, how, screen)
    outcome = run_protocol(protocol, scored, tie)
    result = (
        identity
        | (content(outcome, scored, how.named(score_type(matchers, how.precision))) | notes(matchers, scored.scores))
        | {
            "recipe": {"name": recipe.name, "fingerprint": recipe.fingerprint()},
            "matcher": " + ".join(members),
            "split_uri": split_uri,
            "rejected": len(encoded.problems),
            **flow,
            "seconds": round(time.perf_counter() - started, 2),
        }
    )
    if save_scores:
        write_scores(save_scores, scored)
    _write(output, result, encoded)
    if not uris and not how.screen:
        track(recipe, result, output)
    return result


def _write(output: str, result: dict[str, Any], encoded: EncodedSplit) -> None:
    """The result, and beside it what was rejected."""
    if encoded.problems:
        files.write_atomic(output.replace(".json", ".quarantine.jsonl"), "".join(p.row() + "\n" for p in encoded.problems).encode())
    files.write_atomic(output, json.dumps(result, indent=1).encode())


def agreed(seen: Sequence[EncodedSplit], split_uri: str) -> EncodedSplit:
    """The split as the first member sees it. Raises ValueError when another one had to leave out other images."""
    first = seen[0]
    for number, other in enumerate(seen[1:], 2):
        lost = set(first.names.image_keys) ^ set(other.names.image_keys)
        if lost:
            raise ValueError(f"{split_uri}: only one of the matchers 1 and {number} can read {len(lost)} images, e.g. {min(lost)!r}")
    return first


def score_type(matchers: Sequence[Any], precision: str) -> str:
    kinds = " + ".join(type(matcher).__name__ for matcher in matchers)
    return f"mean of {kinds} scores, {precision}" if len(matchers) > 1 else f"{kinds} score, {precision}"


def flow_of(encoded: EncodedSplit, split_uri: str, manifest: Manifest) -> dict[str, int]:
    """Images in, out and rejected. Raises ValueError when they do not add up to what the manifest promises."""
    out, rejected = len(encoded.names.image_keys), sum(p.stage == "evaluate" for p in encoded.problems)
    if out + rejected != manifest.samples:
        raise ValueError(f"{split_uri}: {out} images and {rejected} rejected ones, its manifest says {manifest.samples}: {CHANGED}")
    return {"rows_in": manifest.samples, "rows_out": out, "rows_rejected": rejected}


def evaluate_scores(
    scores: str, truth: str | None, protocol: str = "auto", tie: str = "pessimistic", output: str | None = None
) -> dict[str, Any]:
    """Evaluate a .npy score matrix (images, captions) of any origin; the truth file holds the ids of its rows and columns."""
    if not truth:
        raise ValueError("--scores needs --truth IDS.json with image_ids, caption_ids and caption_image_ids")
    outcome_of = Scored(_read_scores(scores), read_truth(truth))
    outcome = run_protocol(protocol, outcome_of, tie)
    digest = hashlib.sha256(Path(truth).read_bytes()).hexdigest()[:12]
    about = {"format": FORMAT, "split_hash": digest, "protocol_name": protocol, "tie": tie, "scores": scores, "truth": truth}
    result = about | content(outcome, outcome_of, f"imported, {outcome_of.scores.dtype}")
    files.write_atomic(output or scores.removesuffix(".npy") + ".evaluation.json", json.dumps(result, indent=1).encode())
    return result


def encode(matcher: Any, split_uri: str, manifest: Manifest, recipe: Recipe) -> EncodedSplit:
    """Every image and caption of the split once: here when it is small, else one Ray task a shard."""
    size, shards = recipe.evaluation.batch_size, shards_of(split_uri, manifest)
    if manifest.captions <= IN_PROCESS_CAPTIONS or len(shards) == 1:
        pieces = [encode_shard(matcher, uri, sha256, size, device=own_device()) for uri, sha256 in shards]
    else:
        pieces = _encode_by_tasks(matcher, shards, size)
    return checked(pieces, split_uri, recipe.data.max_reject_rate)


def _encode_by_tasks(matcher: Any, shards: list[tuple[str, str]], batch_size: int) -> list[EncodedSplit]:
    import ray

    from pipelines.on_ray.session import connect, core

    connect()
    gpu = ray.cluster_resources().get("GPU", 0) > 0
    task: Any = ray.remote(num_cpus=core(), num_gpus=1 if gpu else 0)(encode_shard)  # Ray's types stop at the first default
    shared = ray.put(matcher.cpu())
    try:
        return ray.get([task.remote(shared, *shard, batch_size, None, "cuda" if gpu else "cpu") for shard in shards])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def score(
    matchers: Sequence[Any], seen: Sequence[EncodedSplit], manifest: Manifest, recipe: Recipe, how: How = IN_MEMORY, screen: Any = None
) -> Scored:
    """All pairs, or those a screen proposes, in memory or in a store of tiles (`pipelines.on_ray.scoring`); the mean over matchers."""
    identity = {"split_hash": manifest.fingerprint(), "matcher_hash": "+".join(map(weights_hash, matchers))}
    scores = score_split(matchers, seen, replace(how, block=recipe.evaluation.block), absolute(recipe.folder), identity, screen)
    first = seen[0]
    return Scored(scores, first.names, exact_relevance(manifest.source, first.names), first.images, first.captions)


def write_scores(path: str, scored: Scored) -> None:
    """`path` (.npy, float32) and `<path>.ids.json`: what --scores and --truth read."""
    names = scored.names
    rows = {
        "image_ids": names.image_keys,
        "caption_ids": names.caption_ids,
        "caption_image_ids": [names.image_keys[row] for row in names.caption_image.tolist()],
    }
    with files.atomic_stream(path) as stream:
        shape = tuple(scored.scores.shape)
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start in range(0, shape[0], 64):  # streamed scores never fit as a whole
            stream.write(np.ascontiguousarray(scored.scores[start : start + 64], dtype="<f4").tobytes())
    files.write_atomic(f"{path}.ids.json", json.dumps(rows).encode())


def read_truth(path: str) -> Names:
    """Raises ValueError naming the file and the missing key; unknown image ids are left to `Names.check`."""
    try:
        truth = json.loads(Path(path).read_text())
        images, captions, owners = ([str(name) for name in truth[key]] for key in ("image_ids", "caption_ids", "caption_image_ids"))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is no truth file: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; it needs image_ids, caption_ids and caption_image_ids") from None
    if len(captions) != len(owners):
        raise ValueError(f"{path}: {len(captions)} caption_ids but {len(owners)} caption_image_ids")
    row_of = {name: row for row, name in enumerate(images)}
    return names_of(len(images), torch.tensor([row_of.get(name, -1) for name in owners], dtype=torch.int64), images, captions)


def _read_scores(path: str) -> np.ndarray:
    try:
        scores = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy score matrix: {error}") from None
    if scores.ndim != 2 or not np.issubdtype(scores.dtype, np.floating):
        raise ValueError(f"{path} must hold a float matrix (images, captions), not {scores.dtype} {scores.shape}")
    return scores


if __name__ == "__main__":
    import sys

    from pipelines.cli import stage_main

    sys.exit(stage_main("evaluate"))
