"""Recall and equivalence metrics of a matcher on a split of shards, or of a score file that any other code wrote.

    itm evaluate -c demo.yaml                                  # the matcher that `itm train` left in <output>/<name>/matcher
    itm evaluate -c demo.yaml --split val --matcher models:/itm-matcher@champion
    itm evaluate -c coco.yaml --protocol coco-1k-5fold
    itm evaluate --scores scores.npy --truth ids.json          # (images, captions) scores of a foreign model

Protocols: auto (all images x all captions), flickr30k-1k, coco-5k, coco-1k-5fold, eccv, cxc, i2i, t2t. The truth file is a JSON object
{"image_ids": [...], "caption_ids": [...], "caption_image_ids": [...]}, in the order of the rows and columns of the scores.
The result goes to <output>/<name>/evaluation.json and to the MLflow run of the training. Running it again changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
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
from itm.evaluation.dataset import EncodedSplit, Names, checked, encode_shard, exact_relevance, names_of, shard_uris
from itm.evaluation.gallery import examples, histogram
from itm.evaluation.metrics import TIES
from itm.evaluation.protocols import PROTOCOLS, Outcome, Scored, run_protocol
from pipelines.cli import recipe_arguments, recipe_from
from pipelines.score import IN_MEMORY, How, score_split
from pipelines.score import add_arguments as add_scoring_arguments

FORMAT = 1
# Below this many captions one process is done before workers have imported torch.
IN_PROCESS_CAPTIONS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser, required=False)
    parser.add_argument("--matcher", help="matcher folder or models:/name@alias (default: what the recipe's training wrote)")
    parser.add_argument("--split", help="which split (default: data.test_split)")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="default: evaluation.protocol of the recipe")
    parser.add_argument("--tie", choices=TIES, default="pessimistic", help="how equal scores are ordered")
    add_scoring_arguments(parser)
    parser.add_argument("--save-scores", metavar="NPY", help="also write the (images, captions) scores, and <NPY>.ids.json")
    parser.add_argument("--scores", metavar="NPY", help="evaluate this score file instead of a matcher")
    parser.add_argument("--truth", metavar="JSON", help="the ids that belong to --scores")
    parser.add_argument("--output", metavar="JSON", help="where the result of --scores goes (default: beside it)")


def run(args: argparse.Namespace) -> int:
    if args.scores:
        result = evaluate_scores(args.scores, args.truth, args.protocol or "auto", args.tie, args.output)
    elif not args.recipe:
        raise ValueError("say what to evaluate: -c RECIPE, or --scores FILE.npy --truth IDS.json")
    else:
        recipe = recipe_from(args)
        if args.protocol:
            recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"protocol": args.protocol})})
        options = {"tie": args.tie, "how": How.of(args), "save_scores": args.save_scores}
        result = evaluate(recipe, args.matcher, args.split, **options)
    print(table(result))
    return 0


def evaluate(
    recipe: Recipe,
    matcher_uri: str | None = None,
    split: str | None = None,
    *,
    tie: str = "pessimistic",
    how: How = IN_MEMORY,
    save_scores: str | None = None,
) -> dict[str, Any]:
    """Evaluate and write `evaluation*.json` below the recipe's folder; returns its content (`metrics`, `chance`, `counts`, ...).

    Raises ValueError for a split that cannot be read, too many rejected samples, NaN scores, or a protocol that does not fit.
    """
    split = split or recipe.data.test_split
    split_uri = _absolute(files.join(recipe.data.root, split))
    matcher = itm.load_matcher(matcher_uri or files.join(recipe.folder, "matcher"))
    manifest = read_manifest(split_uri)
    output = _output(recipe, matcher_uri, split)
    identity = {
        "format": FORMAT,
        "split": split,
        "split_hash": manifest.fingerprint(),
        "matcher_hash": weights_hash(matcher),
        "protocol_name": recipe.evaluation.protocol,
        "tie": tie,
        "precision": how.precision,
    }
    if not save_scores and (done := _stored(output, identity)):
        return done
    started = time.perf_counter()
    check_present(split_uri, manifest)
    files.remove_abandoned(recipe.folder)
    encoded = encode(matcher, split_uri, manifest, recipe)
    flow = flow_of(encoded, split_uri, manifest)
    scored = score(matcher, encoded, manifest, recipe, how)
    outcome = run_protocol(recipe.evaluation.protocol, scored, tie)
    result = (
        identity
        | _content(outcome, scored, f"{type(matcher).__name__} score, {how.precision}")
        | {
            "recipe": {"name": recipe.name, "fingerprint": recipe.fingerprint()},
            "matcher": matcher_uri or files.join(recipe.folder, "matcher"),
            "split_uri": split_uri,
            "rejected": len(encoded.problems),
            **flow,
            "seconds": round(time.perf_counter() - started, 2),
        }
    )
    if encoded.problems:
        files.write_atomic(output.replace(".json", ".quarantine.jsonl"), "".join(p.row() + "\n" for p in encoded.problems).encode())
    if save_scores:
        write_scores(save_scores, scored)
    files.write_atomic(output, json.dumps(result, indent=1).encode())
    if matcher_uri is None:
        _track(recipe, result, output)
    return result


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
    result = about | _content(outcome, outcome_of, f"imported, {outcome_of.scores.dtype}")
    files.write_atomic(output or scores.removesuffix(".npy") + ".evaluation.json", json.dumps(result, indent=1).encode())
    return result


def encode(matcher: Any, split_uri: str, manifest: Manifest, recipe: Recipe) -> EncodedSplit:
    """Every image and caption of the split once: here when it is small, else one Ray task a shard."""
    size, shards = recipe.evaluation.batch_size, shard_uris(split_uri, manifest)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if manifest.captions <= IN_PROCESS_CAPTIONS or len(shards) == 1:
        pieces = [encode_shard(matcher, uri, size, device=device) for uri in shards]
    else:
        pieces = _encode_by_tasks(matcher, shards, size)
    return checked(pieces, split_uri, recipe.data.max_reject_rate)


def _encode_by_tasks(matcher: Any, shards: list[str], batch_size: int) -> list[EncodedSplit]:
    import ray

    from pipelines.session import connect

    connect()
    gpu = ray.cluster_resources().get("GPU", 0) > 0
    task = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0)(encode_shard)
    shared = ray.put(matcher.cpu())
    return ray.get([task.remote(shared, uri, batch_size, None, "cuda" if gpu else "cpu") for uri in shards])


def score(matcher: Any, encoded: EncodedSplit, manifest: Manifest, recipe: Recipe, how: How = IN_MEMORY) -> Scored:
    """All pairs, in memory or in a store of tiles below the recipe's folder (see `pipelines.score`)."""
    identity = {"split_hash": manifest.fingerprint(), "matcher_hash": weights_hash(matcher)}
    scores = score_split([matcher], [encoded], replace(how, block=recipe.evaluation.block), _absolute(recipe.folder), identity)
    return Scored(scores, encoded.names, exact_relevance(manifest.source, encoded.names), encoded.images, encoded.captions)


def weights_hash(matcher: torch.nn.Module) -> str:
    """12 hex digits over the names, shapes and values of all parameters and buffers, and the options."""
    digest = hashlib.sha256(repr((getattr(matcher, "kind", type(matcher).__name__), getattr(matcher, "options", None))).encode())
    for name, value in sorted(matcher.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


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


def table(result: dict[str, Any]) -> str:
    """The metrics both ways, with chance, readable in a terminal."""
    metrics, chance = result["metrics"], result["chance"]
    names = [n.partition("_")[2] for n in metrics if n.startswith(("i2t_", "i2i_", "t2t_"))]
    ways = [way for way in ("i2t", "t2i", "i2i", "t2t") if any(n.startswith(f"{way}_") for n in metrics)]
    lines = [result["protocol"], "  ".join(f"{key} {value:,}" for key, value in result["counts"].items()), ""]
    lines.append(f"{'':<18}" + "".join(f"{way:>12}{'chance':>12}" for way in ways))
    for name in names:
        cells = (f"{_number(metrics.get(f'{way}_{name}')):>12}{_number(chance.get(f'{way}_{name}')):>12}" for way in ways)
        lines.append(f"{name:<18}" + "".join(cells))
    if "rsum" in metrics:
        lines.append(f"{'rsum':<18}{metrics['rsum']:>12.2f}{chance['rsum']:>12.2f}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def _content(outcome: Outcome, scored: Scored, score_type: str) -> dict[str, Any]:
    names = scored.names
    shown = {way: [_named(row, names, way) for row in rows] for way, rows in examples(scored).items()}
    return {
        "protocol": outcome.protocol,
        "score_type": score_type,
        "metrics": outcome.metrics,
        "chance": outcome.chance,
        "counts": outcome.counts,
        "examples": shown,
        "histogram": histogram(scored),
    }


def _named(row: dict[str, Any], names: Names, way: str) -> dict[str, Any]:
    """An example with keys and texts in place of row numbers."""
    asked, found = (_image, _caption) if way == "i2t" else (_caption, _image)
    hits = [{**asked_hit, **found(names, asked_hit["row"])} for asked_hit in row["hits"]]
    return {**row, **asked(names, row["query"]), "hits": hits}


def _image(names: Names, row: int) -> dict[str, Any]:
    return {"image": names.image_keys[row], "shard": names.image_shards[row] if names.image_shards else None}


def _caption(names: Names, row: int) -> dict[str, Any]:
    return {"caption": names.caption_ids[row], "text": names.texts[row] if names.texts else names.caption_ids[row]}


def _read_scores(path: str) -> np.ndarray:
    try:
        scores = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy score matrix: {error}") from None
    if scores.ndim != 2 or not np.issubdtype(scores.dtype, np.floating):
        raise ValueError(f"{path} must hold a float matrix (images, captions), not {scores.dtype} {scores.shape}")
    return scores


def _output(recipe: Recipe, matcher_uri: str | None, split: str) -> str:
    """`evaluation.json` for what the recipe says; another split, protocol or matcher gets a name of its own."""
    words = (
        ["evaluation"] + [split] * (split != recipe.data.test_split) + [recipe.evaluation.protocol] * (recipe.evaluation.protocol != "auto")
    )
    if matcher_uri:
        words.append(hashlib.sha256(matcher_uri.encode()).hexdigest()[:8])
    return files.join(recipe.folder, "-".join(words) + ".json")


def _stored(output: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    if not files.exists(output):
        return None
    result: dict[str, Any] = json.loads(files.read_bytes(output))
    return result if all(result.get(key) == value for key, value in identity.items()) else None


def _track(recipe: Recipe, result: dict[str, Any], output: str) -> None:
    """Metrics and file into the MLflow run of the training, where there is one."""
    receipt = files.join(recipe.folder, "run.json")
    if not files.exists(receipt):
        return
    from itm.registry import Tracker

    with Tracker.resume(json.loads(files.read_bytes(receipt))["run_id"]) as tracker:
        flow = {name: result[name] for name in ("rows_in", "rows_out", "rows_rejected")}
        tracker.metrics({f"{result['split']}_{name}": value for name, value in (result["metrics"] | flow).items()})
        tracker.tags({f"{result['split']}.protocol": result["protocol"], f"{result['split']}.split_hash": result["split_hash"]})
        if "://" not in output:
            tracker.artifact(output)


def _absolute(uri: str) -> str:
    return uri if "://" in uri else os.path.abspath(uri)


if __name__ == "__main__":
    import sys

    from pipelines.cli import stage_main

    sys.exit(stage_main("evaluate"))
