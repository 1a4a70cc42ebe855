"""Matchers on a split without a recipe or a run's folder: one table of figures and chance, and how sure their differences are."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence

import numpy as np

from itm.config import Recipe, parse_recipe
from itm.data import files
from itm.data.formats import Json
from pipelines.evaluating import FORMAT
from pipelines.evaluating.driver import evaluate
from pipelines.evaluating.result import table
from pipelines.evaluating.score_file import read_truth
from pipelines.on_ray.options import IN_MEMORY, How

EVALUATION = ("protocol", "metrics", "chance", "counts", "matcher_hash", "rows_in", "rows_out", "rows_rejected", "seconds")


def compare(
    models: Sequence[str],
    shards: str,
    protocol: str = "auto",
    tie: str = "pessimistic",
    how: How = IN_MEMORY,
    allow: Sequence[str] = (),
    output: str | None = None,
) -> Json:
    """Evaluate each model on the split `shards`; returns {split_uri, models: [...], differences: [{metric: [difference, low, high]}]}.

    Each difference is of a further model from the first. allow: packages whose parts a matcher may name; output: file for the result.
    Raises ValueError for a name that leads to no matcher, and for models that read different images of the split.
    """
    place = files.absolute(shards)
    found, hits = [], []
    with tempfile.TemporaryDirectory(prefix="itm-evaluate-") as folder:
        recipe = _recipe(place, protocol, folder, allow)
        for number, model in enumerate(models):
            scores = f"{folder}/{number}.npy" if len(models) > 1 else None
            result = evaluate(recipe, model, protocol=protocol, tie=tie, how=how, save_scores=scores)
            found.append({"model": model, **{key: result[key] for key in EVALUATION if key in result}})
            if scores:
                hits.append(_hits(scores, tie))
        differences = [_differences(hits[0], other) for other in hits[1:]]
    said = {"format": FORMAT, "split_uri": place, "models": found, "differences": differences}
    if output:
        files.write_atomic(output, json.dumps(said, indent=1).encode())
    return said


def _recipe(place: str, protocol: str, folder: str, allow: Sequence[str]) -> Recipe:
    """What the driver needs of a recipe. Rejected samples are counted and shown, but no reason to stop: there is no limit to raise."""
    root, _, split = place.rstrip("/").rpartition("/")
    data = {"root": root or "/", "test_split": split, "max_reject_rate": 1.0}
    choices = {"name": "zero-shot", "output": folder, "data": data, "evaluation": {"protocol": protocol}, "model": {"kind": "dual"}}
    return parse_recipe(choices | {"allow": list(allow)})


def _hits(scores: str, tie: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    from itm.evaluation.bootstrap import hits_by_image

    names = read_truth(f"{scores}.ids.json")
    return *hits_by_image(np.load(scores, mmap_mode="r"), names, tie), names.image_keys


def _differences(first: tuple[np.ndarray, np.ndarray, list[str]], other: tuple[np.ndarray, np.ndarray, list[str]]) -> Json:
    from itm.evaluation.bootstrap import paired_intervals

    if first[2] != other[2] or (first[1] != other[1]).any():
        raise ValueError(
            "the models could read different images of the split, so they cannot be compared pair by pair: `itm inspect` names them"
        )
    return dict(paired_intervals(first[0], other[0], first[1]))


def shown(said: Json) -> str:
    """One model as `itm evaluate` shows a result; several in columns, beside chance and the differences from the first."""
    models = said["models"]
    head = [f"{said['split_uri']}: {models[0].get('rows_out', 0):,} images, {models[0].get('rows_rejected', 0):,} rejected"]
    if len(models) == 1:
        return "\n".join([*head, table(models[0])])
    head += [f"{chr(65 + n)}  {model['model']}" for n, model in enumerate(models)]
    letters = [chr(65 + n) for n in range(len(models))]
    columns = "".join(f"{letter:>10}" for letter in letters) + f"{'chance':>10}" + "".join(f"{f'{x} - A  (95 %)':>28}" for x in letters[1:])
    return "\n".join([*head, "", f"{'':<18}{columns}", *_rows(said)])


def _rows(said: Json) -> list[str]:
    models = said["models"]
    rows = []
    for name in models[0]["metrics"]:
        if all(name in model["metrics"] for model in models):
            cells = [f"{model['metrics'][name]:>10.2f}" for model in models] + [f"{models[0]['chance'].get(name, float('nan')):>10.2f}"]
            cells += [f"{d[name][0]:>+12.2f} [{d[name][1]:+.2f}, {d[name][2]:+.2f}]" if name in d else "" for d in said["differences"]]
            rows.append(f"{name:<18}{''.join(cells)}")
    return rows
