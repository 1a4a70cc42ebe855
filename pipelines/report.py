"""One self-contained HTML page about a run: metrics with chance level, loss curves, retrievals right and wrong, scores, lineage.

    itm report -c demo.yaml                                     # -> <output>/<name>/report.html
    itm report -c demo-cusa.yaml --compare runs/demo runs/demo-cusa-shuffled

Reads evaluation.json (of `itm evaluate`), losses.jsonl and run.json (of `itm train`) in the run's folder, and the shards for thumbnails.
The page needs no network and no scripts, and is also logged to the MLflow run.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Iterable, Sequence

from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json, read_json
from itm.data.manifest import full_key
from itm.data.shards import index_shard, read_range
from itm.report.page import Page, render
from pipelines.cli import recipe_arguments, recipe_from, script
from pipelines.evaluating import FORMAT
from pipelines.training import FORMAT as RUN_FORMAT

THUMBNAIL = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--compare", nargs="+", action="extend", default=[], metavar="FOLDER", help="folders of other evaluated runs")


def run(args: argparse.Namespace) -> int:
    print(report(recipe_from(args), args.compare))
    return 0


def report(recipe: Recipe, compare: Sequence[str] = ()) -> str:
    """Write report.html into the run's folder; returns its path. Raises ValueError when the run was not evaluated."""
    evaluation = _evaluation(recipe.folder)
    trained = _json(files.join(recipe.folder, "run.json"), RUN_FORMAT)
    others = {files.name_of(folder): folder for folder in map(_plain, compare)}
    page = Page(
        title=recipe.name,
        about=recipe.about,
        evaluation=evaluation,
        losses=_losses(recipe.folder),
        others={name: _evaluation(folder) for name, folder in others.items()},
        other_losses={name: rows for name, folder in others.items() if (rows := _losses(folder))},
        thumbnails=thumbnails(evaluation),
        lineage=lineage(recipe, evaluation, trained),
    )
    output = files.join(recipe.folder, "report.html")
    files.write_atomic(output, render(page).encode())
    if trained.get("run_id"):
        from itm.tracking.registry import Tracker

        with Tracker.resume(trained["run_id"]) as tracker, files.local_copy(output) as written:
            tracker.artifact(written)
    return output


def lineage(recipe: Recipe, evaluation: Json, trained: Json) -> dict[str, str]:
    """Where the numbers come from: choices, data, teachers, code, weights, run."""
    teachers = ", ".join(f"{modality}: {name}" for modality, name in trained.get("teachers", {}).items())
    training = f"{trained['steps']:,} steps in {trained['seconds']:,.0f} s" if {"steps", "seconds"} <= set(trained) else ""
    facts = {
        "Recipe": f"{recipe.name} {evaluation.get('recipe', {}).get('fingerprint', recipe.fingerprint())}",
        "Model and method": f"{recipe.model.kind}, {recipe.method.kind}",
        "Training": training,
        "Training data": trained.get("manifest", ""),
        "Test data": f"{evaluation['split']} {evaluation['split_hash']}",
        "Teachers": teachers,
        "Weights": evaluation.get("matcher_hash", ""),
        "Matcher": evaluation.get("matcher", ""),
        "Code": trained.get("git_commit", ""),
        "MLflow run": trained.get("run_id", ""),
        "Rejected samples": str(evaluation.get("rejected", "")),
    }
    return {label: str(text) for label, text in facts.items() if text}


def thumbnails(evaluation: Json) -> dict[str, str]:
    """Image key -> JPEG data URI, for the images of the examples that have one; read by byte range from their shards."""
    wanted: dict[str, set[str]] = {}
    for row in _images(evaluation):
        if row.get("shard"):
            wanted.setdefault(row["shard"], set()).add(row["image"])
    found: dict[str, str] = {}
    for shard, keys in wanted.items():
        for entry in index_shard(shard):
            shown = keys & {entry.key, full_key(shard, entry.key)}
            if shown and (image := read_range(shard, entry.start, entry.end).image):
                found |= dict.fromkeys(shown, _data_uri(image))
    return found


def _images(evaluation: Json) -> Iterable[Json]:
    shown = evaluation.get("examples", {})
    yield from shown.get("i2t", [])
    for row in shown.get("t2i", []):
        yield from row["hits"]


def _data_uri(image: bytes) -> str:
    from PIL import Image

    from itm.data.pixels import decode

    picture = decode(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _evaluation(folder: str) -> Json:
    found = _json(files.join(folder, "evaluation.json"), FORMAT)
    if not found:
        raise ValueError(f"no evaluation.json in {folder}; run `itm evaluate` with the same recipe first")
    return found


def _losses(folder: str) -> list[dict[str, float]]:
    uri = files.join(folder, "losses.jsonl")
    return [json.loads(line) for line in files.read_bytes(uri).decode().split("\n") if line] if files.exists(uri) else []


def _json(uri: str, known: int) -> Json:
    return read_json(uri, known) if files.exists(uri) else {}


def _plain(folder: str) -> str:
    return folder.rstrip("/")


if __name__ == "__main__":
    script(__file__)
