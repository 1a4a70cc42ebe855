"""Protocols of `itm evaluate` that ask the matcher itself and not its scores: sts (rated sentence pairs), isd and isda (relations)."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import itm
from itm.config import Recipe
from itm.data import files
from itm.data.shards import read_manifest
from itm.distributed import own_device
from itm.evaluation.relations import isd_of_split
from itm.evaluation.sentence_pairs import read_pairs, sts
from itm.matchers.weights import weights_hash
from pipelines.evaluating import FORMAT
from pipelines.evaluating.result import output_of, stored, track

MOST_PAIRS = 64  # relation blocks of so many pairs are held at once


def probe(args: argparse.Namespace, recipe: Recipe | None) -> dict[str, Any]:
    """Writes the result and returns its content. Raises ValueError when what the protocol needs is not named."""
    name, uris = args.protocol, list(args.matcher or [])
    if len(uris) > 1:
        raise ValueError(f"protocol {name} is of one matcher, not of an ensemble: name one --matcher")
    if (name == "sts") != bool(args.pairs):
        raise ValueError("protocol sts needs --pairs FILE" if name == "sts" else "--pairs is for --protocol sts")
    if recipe is None and (name != "sts" or not uris):
        raise ValueError(f"protocol {name} needs -c RECIPE" + " or --matcher FOLDER" * (name == "sts"))
    if recipe is None:
        uri, output = uris[0], args.output or f"{args.pairs[0]}.evaluation.json"
    else:
        uri = uris[0] if uris else files.join(recipe.folder, "matcher")
        output = output_of(recipe, uris, args.split or recipe.data.test_split, name)
    matcher = itm.load_matcher(uri)
    identity = {"format": FORMAT, "matcher_hash": weights_hash(matcher), "protocol_name": name, "matcher": uri}
    result = _sts(args, recipe, matcher, identity, output) if name == "sts" else _isd(args, recipe, matcher, identity, output)
    if recipe is not None and not uris:
        track(recipe, result, output)
    return result


def _sts(args: argparse.Namespace, recipe: Recipe | None, matcher: Any, identity: dict[str, Any], output: str) -> dict[str, Any]:
    columns = args.pair_columns.split(",") if args.pair_columns else None
    hashes = "+".join(hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] for path in args.pairs)
    identity = identity | {"split": "sts", "split_hash": hashes, "pairs": args.pairs, "columns": columns}
    if done := stored(output, identity):
        return done
    pairs = [read_pairs(path, columns, recipe.data.max_reject_rate if recipe else 0.01) for path in args.pairs]
    outcome = sts(matcher, pairs, recipe.evaluation.batch_size if recipe else 256, own_device())
    bad = [[file.path, line, reason] for file in pairs for line, reason in file.bad]
    return _written(output, identity | {"score_type": "cosine of captions, fp32", "rejected_rows": bad} | asdict(outcome))


def _isd(args: argparse.Namespace, recipe: Recipe | None, matcher: Any, identity: dict[str, Any], output: str) -> dict[str, Any]:
    assert recipe is not None
    split = args.split or recipe.data.test_split
    split_uri = files.absolute(files.join(recipe.data.root, split))
    identity = identity | {"split": split, "split_hash": read_manifest(split_uri).fingerprint()}
    if done := stored(output, identity):
        return done
    annotated = identity["protocol_name"] == "isda"
    outcome = isd_of_split(matcher, split_uri, annotated, min(recipe.evaluation.batch_size, MOST_PAIRS), own_device())
    return _written(output, identity | {"score_type": "relation blocks, fp32", "split_uri": split_uri} | asdict(outcome))


def _written(output: str, result: dict[str, Any]) -> dict[str, Any]:
    files.write_atomic(output, json.dumps(result, indent=1).encode())
    return result
