"""The driver of `itm evaluate`: encode the split once, score it, run the protocol, write the result and what was rejected."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import itm
from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json
from itm.data.manifest import CHANGED, check_present
from itm.data.shards import Manifest, read_manifest
from itm.device import resolve_device
from itm.evaluation.dataset import EncodedSplit, checked, encode_shard, exact_relevance, shards_of
from itm.evaluation.protocols import Scored, find_protocol, run_protocol
from itm.matchers.mean import beside, one_by_one
from itm.matchers.weights import weights_hash
from itm.report.answers import answers
from pipelines.evaluating import FORMAT
from pipelines.evaluating.looks import for_the_page
from pipelines.evaluating.measured import answers_of
from pipelines.evaluating.result import check_track, content, output_of, stored, track
from pipelines.evaluating.score_file import write_scores
from pipelines.on_ray.gpus import gpus_elsewhere
from pipelines.on_ray.options import IN_MEMORY, How
from pipelines.on_ray.pool import Pool
from pipelines.on_ray.reach import shared
from pipelines.on_ray.scoring import notes, score_split, seats_for

# Below this many captions one process is done before workers have imported torch.
IN_PROCESS_CAPTIONS = 20_000


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

    Several, or a mean, are an ensemble: mean scores. Raises ValueError for an unreadable split, too many rejects, NaN, a protocol that does
    not fit, and members that read other data.
    """
    split, protocol = split or recipe.data.test_split, protocol or recipe.evaluation.protocol
    options = recipe.evaluation.options.get(protocol)
    judge = find_protocol(protocol, options)
    folds = 1 if save_scores else getattr(judge, "folds", 1)
    split_uri = files.absolute(files.join(recipe.data.root, split))
    uris = [matcher_uri] if isinstance(matcher_uri, str) else list(matcher_uri or [])
    members = uris or recipe.evaluation.ensemble or [files.join(recipe.folder, "matcher")]
    matchers = one_by_one([itm.load_matcher(uri, allow=recipe.allowed) for uri in members], members)
    screener = itm.load_matcher(how.screen_matcher, allow=recipe.allowed) if how.screen and how.screen_matcher else None
    manifest = read_manifest(split_uri).check_captioned(split_uri, "evaluated")
    output = how.named(output_of(recipe, uris, split, protocol))
    identity = {"format": FORMAT, "split": split, "split_hash": manifest.fingerprint(), "protocol_name": protocol, "tie": tie}
    identity |= (
        judge.identity()
        | {"matcher_hash": "+".join(map(weights_hash, matchers))}
        | how.identity(weights_hash(screener) if screener else None)
    )
    if not save_scores and (done := stored(output, identity)):
        return done
    started = time.perf_counter()
    if not uris and how.of_record:
        check_track(recipe)
    check_present(split_uri, manifest)
    files.remove_abandoned(recipe.folder)
    seen = [encode(matcher, split_uri, manifest, recipe) for matcher in matchers]
    screen = encode(screener, split_uri, manifest, recipe) if screener else None
    encoded = agreed([*seen, screen] if screen else seen, split_uri)
    flow = flow_of(encoded, split_uri, manifest) | captions_of(encoded, split_uri, manifest)
    scored = score(matchers, seen, manifest, recipe, how, screen, folds)
    outcome = run_protocol(protocol, scored, tie, options)
    result = identity | content(outcome, scored, how.named(score_type(matchers, how.precision))) | notes(matchers, scored.scores)
    shown = for_the_page(matchers, seen, result)
    result |= {
        "recipe": {"name": recipe.name, "fingerprint": recipe.fingerprint()},
        "matcher": " + ".join(members),
        "split_uri": split_uri,
        "rejected": len(encoded.problems),
    }
    result |= flow | shown | {"seconds": round(time.perf_counter() - started, 2)}
    if save_scores:
        write_scores(save_scores, scored)
    _write(output, result, encoded, answers(scored))
    if not uris and how.of_record:
        track(recipe, result, output)
    return result


def _write(output: str, result: Json, encoded: EncodedSplit, found: Json) -> None:
    """The result, and beside it what each query found and what was rejected."""
    if encoded.problems:
        files.write_atomic(output.replace(".json", ".quarantine.jsonl"), "".join(p.row() + "\n" for p in encoded.problems).encode())
    files.write_atomic(answers_of(output), json.dumps(found).encode())
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
    """Samples in, out (copies of an image too) and rejected. Raises ValueError when they do not add up to what the manifest promises."""
    out, rejected = (
        len(encoded.names.image_keys) + encoded.copies,
        sum(p.stage == "evaluate" and p.what != "caption" for p in encoded.problems),
    )
    if out + rejected != manifest.samples:
        raise ValueError(f"{split_uri}: {out} images and {rejected} rejected ones, its manifest says {manifest.samples}: {CHANGED}")
    return {"rows_in": manifest.samples, "rows_out": out, "rows_rejected": rejected}


def captions_of(encoded: EncodedSplit, split_uri: str, manifest: Manifest) -> dict[str, int]:
    """As `flow_of`, of captions; and how many of the samples are copies of an image, where there are some."""
    out, rejected = len(encoded.names.caption_ids), sum(p.lost_captions for p in encoded.problems if p.stage == "evaluate")
    if out + rejected != manifest.captions:
        raise ValueError(f"{split_uri}: {out} captions and {rejected} rejected ones, its manifest says {manifest.captions}: {CHANGED}")
    copies = {"copies": encoded.copies} if encoded.copies else {}
    return {"captions_in": manifest.captions, "captions_out": out, "captions_rejected": rejected} | copies


def encode(matcher: Any, split_uri: str, manifest: Manifest, recipe: Recipe) -> EncodedSplit:
    """Every image and caption of the split once: here when it is small, else shard by shard in actors, on GPUs where there are some."""
    size, shards = recipe.evaluation.batch_size, shards_of(split_uri, manifest)
    small = manifest.captions <= IN_PROCESS_CAPTIONS or len(shards) == 1
    if small and not gpus_elsewhere():
        pieces = [encode_shard(matcher, uri, sha256, size, device=resolve_device()) for uri, sha256 in shards]
    else:
        seats, cpus = seats_for(len(shards))
        jobs = (((uri, sha256, size, None, seats.device), ()) for uri, sha256 in shards)
        with shared({}, read={"data.root": split_uri}):
            pieces = list(Pool(seats, cpus, encode_shard, matcher.cpu()).map(jobs))
    return checked(pieces, split_uri, recipe.data.max_reject_rate)


def score(
    matchers: Sequence[Any],
    seen: Sequence[EncodedSplit],
    manifest: Manifest,
    recipe: Recipe,
    how: How = IN_MEMORY,
    screen: Any = None,
    folds: int = 1,
) -> Scored:
    """All pairs, those of each fold, or those a screen proposes, in memory or in a store of tiles (`pipelines.on_ray.scoring`).

    Of several matchers the mean.
    """
    identity = {"split_hash": manifest.fingerprint(), "matcher_hash": "+".join(map(weights_hash, matchers))}
    how, root = replace(how, block=recipe.evaluation.block), files.absolute(recipe.folder)
    scores = score_split(matchers, seen, how, root, identity, screen, folds)
    first = seen[0]
    images, captions = first.images, first.captions
    if len(seen) > 1:
        images, captions = beside([split.images for split in seen]), beside([split.captions for split in seen])
    return Scored(scores, first.names, exact_relevance(manifest.source, first.names), images, captions)
