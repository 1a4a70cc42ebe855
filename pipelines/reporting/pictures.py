"""The pictures of a run, as numbers: computed once from its matcher and kept in pictures.json beside its evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import itm
from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json, check_format
from itm.data.shards import read_manifest
from itm.device import resolve_device
from itm.report.pair import FORMAT, explained, find_pair
from itm.report.thresholds import fits_of
from itm.types import Matcher
from pipelines.reporting.batch import batch_of

NAME = "pictures.json"


def pictures_of(recipe: Recipe, evaluation: Json, trained: Json, losses: Sequence[Mapping[str, float]]) -> Json:
    """`pair`: image, shard, caption, text; `models`: by name what `itm.report.pair.explained` gives; `batch`: as `batch_of`; `fits`: as
    `itm.report.thresholds.fits_of`; `lacks`: what could not be made at all, and why. The work of an earlier call is taken over where
    weights, data and pair are the same.
    """
    told: Json = {"format": FORMAT, "fits": fits_of(losses, steps_per_epoch(recipe, trained))}
    example = next((row for row in evaluation.get("examples", {}).get("t2i", []) if row["right"] and row.get("answer")), None)
    if example is None or not example["answer"].get("shard"):
        return told | {"lacks": ["pictures of a pair: the evaluation names no caption that found its image among shards"]}
    shown = {"image": example["answer"]["image"], "caption": example["caption"]}
    identity = {"matcher_hash": evaluation.get("matcher_hash"), "split_hash": evaluation.get("split_hash"), "shown": shown}
    identity |= {"recipe": recipe.fingerprint(), "steps": trained.get("steps")}
    uri = files.join(recipe.folder, NAME)
    if (kept := _kept(uri, identity)) is not None:
        return kept | told
    try:
        told |= _made(recipe, evaluation, shown, losses)
    except (ValueError, OSError) as error:
        return told | {"lacks": [f"pictures of a pair and of a batch: {error}"]}
    told |= {"identity": identity}
    files.write_atomic(uri, json.dumps(told).encode())
    return told


def _made(recipe: Recipe, evaluation: Json, shown: Json, losses: Sequence[Mapping[str, float]]) -> Json:
    split, device = evaluation["split_uri"], resolve_device()
    pair = find_pair(split, shown["image"], shown["caption"])
    matchers = {uri: itm.load_matcher(uri, allow=recipe.allowed) for uri in evaluation["matcher"].split(" + ")}
    models = {name: explained(matcher, pair, device) for name, matcher in named(matchers).items()}
    about = {"image": pair.image.key, "shard": pair.shard, "caption": pair.caption.id, "text": pair.caption.text, "own": pair.own}
    first = next(iter(matchers.values()))
    of_members = {"lacks": ["pictures of a batch: an ensemble is not trained; `itm report` of its members makes theirs"]}
    batch = batch_of(recipe, first, losses[-1] if losses else {}, device) if len(matchers) == 1 else of_members
    return {"pair": about, "models": models, "batch": batch, "lacks": []}


def named(matchers: Mapping[str, Matcher]) -> dict[str, Matcher]:
    """The matchers by the last words of their URIs that tell them apart; of a mean, its members."""
    short = {uri: uri.rstrip("/").removesuffix("/matcher").rsplit("/", 1)[-1] for uri in matchers}
    apart = {short[uri] if list(short.values()).count(short[uri]) == 1 else uri: matcher for uri, matcher in matchers.items()}
    found: dict[str, Matcher] = {}
    for name, matcher in apart.items():
        members = matcher.averaged
        kinds = [member.kind for member in members]
        for number, member in enumerate(members, 1):
            apart_from = f" {number}" if kinds.count(member.kind) > 1 else ""
            found[f"{name}: {member.kind}{apart_from}" if len(members) > 1 else name] = member
    return found


def steps_per_epoch(recipe: Recipe, trained: Json) -> float | None:
    """Of a finished run: the captions of the training split over the pairs of a step; None where the shards are gone or unknown."""
    if not trained.get("steps") or not trained.get("rows_in") or recipe.data.mix:
        return None
    try:
        captions = read_manifest(files.join(recipe.data.root, recipe.data.train_split)).captions
    except (ValueError, OSError):
        return None
    return captions / (trained["rows_in"] / trained["steps"])


def _kept(uri: str, identity: Json) -> Json | None:
    if not files.exists(uri):
        return None
    try:
        said: Json = json.loads(files.read_bytes(uri))
    except ValueError:
        return None
    check_format(uri, said, FORMAT)
    return said if said.get("identity") == identity else None
