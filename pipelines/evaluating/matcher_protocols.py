"""Protocols of `itm evaluate` that ask the matcher itself and not its scores, a `MatcherProtocol` of a user's own too."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import replace

import itm
from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json
from itm.data.shards import read_manifest
from itm.device import resolve_device
from itm.evaluation.protocols import MatcherProtocol, Outcome, Question
from itm.matchers.mean import Mean
from itm.matchers.weights import weights_hash
from itm.types import Matcher
from pipelines.evaluating import FORMAT
from pipelines.evaluating.result import check_track, output_of, stored, track
from pipelines.on_ray.gpus import at_gpu, gpus_elsewhere


def probe(args: argparse.Namespace, recipe: Recipe | None, name: str, protocol: MatcherProtocol) -> Json:
    """Writes the result and returns its content. Raises ValueError when what the protocol needs is not named."""
    uris, by_pairs = list(args.matcher or []), protocol.reads == "pairs"
    if by_pairs != bool(args.pairs):
        raise ValueError(f"protocol {name} needs --pairs FILE" if by_pairs else f"--pairs is for --protocol sts, {name} reads a split")
    if recipe is None and not (uris and (by_pairs or args.shards)):
        raise ValueError(f"protocol {name} needs -c RECIPE or --matcher FOLDER" + " with --shards FOLDER" * (not by_pairs))
    members = uris if uris or recipe is None else recipe.evaluation.ensemble or [files.join(recipe.folder, "matcher")]
    output = args.output if recipe is None else output_of(recipe, uris, _split(args, recipe), name, args.pairs or ())
    if recipe is None and by_pairs and not output:
        output = args.pairs[0].rstrip("/") + f".{name}" * (name != "sts") + ".evaluation.json"
    loaded = [itm.load_matcher(uri, allow=args.allow if recipe is None else recipe.allowed) for uri in members]
    matcher = loaded[0] if len(loaded) == 1 else Mean.of(loaded, members)
    identity = {"format": FORMAT, "matcher_hash": weights_hash(matcher), "protocol_name": name, "matcher": " + ".join(members)}
    asked, about = _question(args, recipe, name, protocol)
    identity |= protocol.identity() | about
    if output and (done := stored(output, identity)):
        return done
    if recipe is not None and not uris:
        check_track(recipe)
    away = not by_pairs and gpus_elsewhere()  # a file of pairs may be on this machine alone
    outcome = at_gpu(_measured, protocol, matcher.cpu(), asked) if away else protocol.measure(matcher, asked)
    where = {} if by_pairs else {"split_uri": asked.split_uri}
    numbers = {"protocol": outcome.protocol, "metrics": outcome.metrics, "chance": outcome.chance, "counts": outcome.counts}
    result = identity | {"score_type": protocol.score_type} | where | outcome.details | numbers
    if output:
        files.write_atomic(output, json.dumps(result, indent=1).encode())
    if recipe is not None and not uris:
        track(recipe, result, output)
    return result


def _measured(protocol: MatcherProtocol, matcher: Matcher, asked: Question) -> Outcome:
    """On a worker, whose device is another one than the driver's."""
    return protocol.measure(matcher, replace(asked, device=resolve_device()))


def _split(args: argparse.Namespace, recipe: Recipe | None) -> str:
    """What the split is called: --shards names its folder."""
    return args.split or (files.name_of(args.shards.rstrip("/")) if args.shards else recipe.data.test_split if recipe else "")


def _question(args: argparse.Namespace, recipe: Recipe | None, name: str, protocol: MatcherProtocol) -> tuple[Question, Json]:
    """What the protocol reads, and what of it the result depends on."""
    size = recipe.evaluation.batch_size if recipe else Question.batch_size
    rejected = recipe.data.max_reject_rate if recipe else Question.max_reject_rate
    if protocol.reads == "pairs":
        columns = args.pair_columns.split(",") if args.pair_columns else None
        hashes = "+".join(hashlib.sha256(files.read_bytes(path)).hexdigest()[:12] for path in protocol.files_of(args.pairs))
        asked = Question(pairs=args.pairs, columns=columns, batch_size=size, max_reject_rate=rejected, device=resolve_device())
        return asked, {"split": name, "split_hash": hashes, "pairs": args.pairs, "columns": columns}
    split = _split(args, recipe)
    uri = files.absolute(args.shards or files.join(recipe.data.root if recipe else "", split))
    asked = Question(split_uri=uri, batch_size=size, max_reject_rate=rejected, device=resolve_device())
    return asked, {"split": split, "split_hash": read_manifest(uri).fingerprint()}
