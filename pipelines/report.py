"""One self-contained HTML page about a run: metrics with chance level, loss curves, retrievals right and wrong, scores, lineage.

    itm report -c demo.yaml                                     # -> <output>/<name>/report.html
    itm report -c demo-cusa.yaml --compare runs/demo runs/demo-cusa-shuffled

Reads every evaluation*.json (of `itm evaluate`) that is of the run's weights, each protocol under its own name, losses.jsonl and run.json
(of `itm train`) in the run's folder, and the shards for thumbnails. From the matcher and, for a run with soft labels, its stores it makes
the pictures of the papers: relation matrices, gates, edges, words that a threshold cuts and its Gaussians, teacher against student, false
negatives. They are computed once and kept in pictures.json; --no-pictures leaves them out. With --compare also curves of the runs in one
plot, and the queries that one run got right and the other wrong. What a page lacks is named on it, with the reason.
The page needs no network and no scripts, and is also logged to the MLflow run. `itm explain --pair` makes one for any pair.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from itm.arguments import read_from
from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json, read_json
from itm.data.manifest import full_key
from itm.data.shards import index_shard, read_manifest, read_range
from itm.report.disagreements import FORMAT as QUERIES
from itm.report.disagreements import disagreements
from itm.report.explain_page import PHOTO
from itm.report.page import render
from itm.report.shown import Page
from itm.report.thumbnails import data_uri
from pipelines.cli import recipe_arguments, recipe_from, script
from pipelines.evaluating import FORMAT
from pipelines.evaluating.measured import answers_of, measured
from pipelines.training import FORMAT as RUN_FORMAT

if TYPE_CHECKING:
    from itm.tracking.history import History


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument(
        "--compare", nargs="+", action="extend", default=[], metavar="FOLDER", type=read_from, help="folders of other evaluated runs"
    )
    parser.add_argument(
        "--no-pictures", action="store_true", help="without what is computed from the matcher: words, relations, gates, soft labels"
    )


def run(args: argparse.Namespace) -> int:
    recipe = recipe_from(args)
    page = page_of(recipe, args.compare, pictures=not args.no_pictures)
    print(report(recipe, args.compare, page))
    for text in page.missing:
        print(f"not on the page: {text}")
    return 0


def report(recipe: Recipe, compare: Sequence[str] = (), page: Page | None = None) -> str:
    """Write report.html into the run's folder; returns its path. Raises ValueError when the run was not evaluated.

    page: what `page_of` gave, where the caller has it.
    """
    page = page or page_of(recipe, compare)
    output = files.join(recipe.folder, "report.html")
    trained = _json(files.join(recipe.folder, "run.json"), RUN_FORMAT)
    run_id = None
    if trained.get("run_id"):
        from itm.tracking.runs import run_to_log

        run_id = run_to_log(recipe.folder)
    files.write_atomic(output, render(page).encode())
    if run_id:
        from itm.tracking.runs import Tracker

        with Tracker.resume(run_id) as tracker, files.local_copy(output) as written:
            tracker.artifact(written)
    return output


def page_of(recipe: Recipe, compare: Sequence[str] = (), pictures: bool = True) -> Page:
    """What the page shows, and what is missing on it. pictures: those that are computed from the matcher, too.

    Raises ValueError when the run was not evaluated.
    """
    evaluation = _evaluation(recipe.folder)
    trained = _json(files.join(recipe.folder, "run.json"), RUN_FORMAT)
    others = {files.name_of(folder): folder for folder in map(_plain, compare)}
    history = _history(recipe.folder) if trained.get("run_id") else None
    losses = _losses(recipe.folder)
    shown = _pictures(recipe, evaluation, trained, losses) if pictures else {}
    differ, unknown = _disagreements(recipe.folder, others)
    return Page(
        title=recipe.name,
        about=recipe.about,
        evaluation=evaluation,
        losses=losses,
        others={name: _evaluation(folder) for name, folder in others.items()},
        other_losses={name: rows for name, folder in others.items() if (rows := _losses(folder))},
        thumbnails=thumbnails([*_images(evaluation), *_images_of_pictures(shown), *_images_of_disagreements(differ)]),
        lineage=lineage(recipe, evaluation, trained, history),
        validations=history.validations if history else (),
        missing=[*missing(recipe, evaluation, trained, history, losses), *unknown],
        other_validations={name: found.validations for name, folder in others.items() if (found := _history(folder))},
        protocols=dict(list(measured(recipe.folder).items())[1:]),
        pictures=shown,
        photo=_photo(shown),
        disagreements=differ,
    )


def _pictures(recipe: Recipe, evaluation: Json, trained: Json, losses: Sequence[Mapping[str, float]]) -> Json:
    from pipelines.reporting.pictures import pictures_of

    return pictures_of(recipe, evaluation, trained, losses)


def _disagreements(own: str, others: Mapping[str, str]) -> tuple[dict[str, Json], list[str]]:
    """By name of a compared run, the queries that it and this one answered differently; and why there are none of a run."""
    found, lacks = {}, []
    queries = {folder: _json(answers_of(files.join(folder, "evaluation.json")), QUERIES) for folder in (own, *others.values())}
    for name, folder in others.items():
        if folder.rstrip("/") == own.rstrip("/"):
            continue
        lost = [where for where in (own, folder) if not queries[where]]
        if lost:
            lacks.append(f"what {name} got right and this run wrong: {lost[0]} has no answers.json; evaluate it again")
        else:
            found[name] = disagreements(queries[own], queries[folder])
    return found, lacks


def _history(folder: str) -> History | None:
    from itm.tracking.runs import run_to_log

    if (run_id := run_to_log(folder, quiet=True)) is None:
        return None
    from itm.tracking.history import history_of

    return history_of(run_id)


def missing(recipe: Recipe, evaluation: Json, trained: Json, history: History | None, losses: Sequence[Any]) -> list[str]:
    """What a page could show and this one does not, each with what would bring it."""
    found = []
    if not trained:
        found.append(f"the training: no run.json in {recipe.folder}; the matcher was made elsewhere, or `itm train` has not ended")
    elif history is None:
        found.append(f"the validation curve and the registry: the tracking address in use does not know run {trained['run_id']}")
    elif not history.versions:
        found.append("a registered version: `itm register` with the same recipe makes one")
    if trained and not losses:
        found.append(f"the loss curve: no losses.jsonl in {recipe.folder}")
    if history and not history.validations:
        found.append("the validation curve: the run was not validated; set data.val_split")
    if "ranks" not in evaluation and "examples" in evaluation:
        found.append("ranks and worst queries: an earlier version evaluated this run; delete evaluation.json, and run `itm evaluate` again")
    return found


def lineage(recipe: Recipe, evaluation: Json, trained: Json, history: History | None = None) -> dict[str, str]:
    """Where the numbers come from: choices, data, teachers, code, weights, run."""
    teachers = ", ".join(f"{modality}: {name}" for modality, name in trained.get("teachers", {}).items())
    training = f"{trained['steps']:,} steps in {trained['seconds']:,.0f} s" if {"steps", "seconds"} <= set(trained) else ""
    facts = {
        "Recipe": f"{recipe.name} {evaluation.get('recipe', {}).get('fingerprint', recipe.fingerprint())}",
        "Model and method": _made_by(recipe),
        "Trained": _when(trained),
        "Evaluated": _when(evaluation),
        "Machine": evaluation.get("environment", {}).get("machine", ""),
        "Versions": ", ".join(f"{name} {text}" for name, text in evaluation.get("environment", {}).get("versions", {}).items()),
        "Training": training,
        "Splits": "; ".join(_sizes(recipe)),
        "Registered as": "; ".join(history.versions) if history else "",
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


def _made_by(recipe: Recipe) -> str:
    members = recipe.evaluation.ensemble
    return f"mean of {', '.join(members)}" if members else f"{recipe.model.kind}, {recipe.method.kind}"


def _when(result: Json) -> str:
    """The date and the device of a result; '' of one that an earlier version wrote."""
    made = result.get("environment", {})
    return ", ".join(filter(None, (made.get("date", "").replace("T", " ").replace("+00:00", " UTC"), made.get("device", ""))))


def _sizes(recipe: Recipe) -> Iterable[str]:
    """The splits of the recipe that are there: images, captions, rejected samples."""
    for split in dict.fromkeys(filter(None, (recipe.data.train_split, recipe.data.val_split, recipe.data.test_split))):
        try:
            manifest = read_manifest(files.join(recipe.data.root, split))
        except (ValueError, OSError):  # the shards may be gone since
            continue
        yield f"{split} {manifest.samples:,} images, {manifest.captions:,} captions, {manifest.rejected:,} rejected"


def thumbnails(rows: Iterable[Json]) -> dict[str, str]:
    """Image key -> JPEG data URI, for the images of the rows (`image`, `shard`) that have one; read by byte range from their shards."""
    wanted: dict[str, set[str]] = {}
    for row in rows:
        if row.get("shard"):
            wanted.setdefault(row["shard"], set()).add(row["image"])
    found: dict[str, str] = {}
    for shard, keys in wanted.items():
        for entry in index_shard(shard):
            shown = keys & {entry.key, full_key(shard, entry.key)}
            if shown and (image := read_range(shard, entry.start, entry.end).image):
                found |= dict.fromkeys(shown, data_uri(image))
    return found


def _images(evaluation: Json) -> Iterable[Json]:
    for shown in (evaluation.get("examples", {}), evaluation.get("worst", {})):
        yield from shown.get("i2t", [])
        for row in shown.get("t2i", []):
            yield from row["hits"]
            yield from [row["answer"]] if "answer" in row else []
    yield from evaluation.get("attention", [])
    for row in evaluation.get("similar", {}).get("i2i", []):
        yield from (row, *row["hits"])


def _images_of_pictures(pictures: Json) -> Iterable[Json]:
    yield from [pictures["pair"]] if "pair" in pictures else []
    soft = pictures.get("batch", {}).get("soft_labels", {})
    yield from soft.get("row", {}).get("images", [])
    for row in soft.get("alike", {}).get("pairs", []):
        yield from (row, {"image": row["own_image"], "shard": row["own_shard"]})


def _images_of_disagreements(differ: Mapping[str, Json]) -> Iterable[Json]:
    for found in differ.values():
        for side in ("own", "other"):
            for told in (told for row in found["t2i"][side] for told in row.values()):
                yield from told["hits"]
            yield from (row["own"] for row in found["i2t"][side])


def _photo(pictures: Json) -> str:
    """The image of the pair that the pictures are of, larger than a thumbnail; '' where there is none."""
    if "pair" not in pictures:
        return ""
    from itm.report.pair import find_pair

    image = find_pair(pictures["pair"]["shard"].rpartition("/")[0], pictures["pair"]["image"]).image.image
    return data_uri(image, PHOTO) if image else ""


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
