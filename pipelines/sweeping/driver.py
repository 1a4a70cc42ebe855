"""The driver of `itm sweep`: it draws the trials, has Ray Tune run those that are open, and writes what won."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import yaml

from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json, read_json
from itm.tracking.addresses import check_alive, tracking_uri
from itm.tracking.lineage import git_commit
from itm.tracking.runs import Tracker
from pipelines.sweeping import FORMAT
from pipelines.sweeping.spaces import Space, draw, parse_spaces, with_choices
from pipelines.sweeping.trials import Asked, Trial, sweep_folder
from pipelines.training.driver import located
from pipelines.training.ending import check_watched
from pipelines.training.preparation import prepare, training_manifest


def sweep(given: Recipe, asked: Asked, overwrite: bool = False) -> Json:
    """Run, go on with, or recognise a sweep; returns what sweep.json holds. Raises ValueError, before any work, for what cannot run."""
    spaces = parse_spaces(asked.spaces, given)
    check_recipe(given)
    recipe = located(given)
    folder = sweep_folder(recipe)
    files.check_writable(folder)
    if overwrite:
        forget(folder)
    started = checked(folder, given, asked, spaces)
    trials = [Trial.of(recipe, number, choices) for number, choices in enumerate(draw(spaces, asked.seed, asked.trials))]
    if len(trials) < asked.trials:
        print(f"the spaces hold no more than {len(trials)} trials that differ")
    if not (waiting := [trial for trial in trials if trial.state == "open"]) and started.get("best") is not None:
        print(f"{folder} is finished: {len(trials)} trials; more --trials go on from there, --overwrite sweeps again")
        return started
    check_alive()
    if waiting:
        prepare(waiting[0].recipe, training_manifest(waiting[0].recipe))  # what one trial cannot do, none can
    with parent(recipe, asked, spaces, started) as tracker:
        said = {
            "format": FORMAT,
            "recipe_fingerprint": given.fingerprint(),
            "spaces": {space.key: str(space) for space in spaces},
            "seed": asked.seed,
            "metric": recipe.registry.metric,
            "run_id": tracker.run_id,
            "tracking_uri": tracker.uri,
        }
        _write(folder, said)
        failed = run_open(trials, waiting, asked, tracker) if waiting else {}
        said |= outcome(given, trials, failed, folder)
        _write(folder, said)
        _record(tracker, said, folder)
    return said


def check_recipe(recipe: Recipe) -> None:
    """Raises ValueError for what trials cannot do."""
    if recipe.evaluation.ensemble:
        raise ValueError(f"{recipe.name} is an ensemble, which has nothing to sweep: sweep a member of it")
    check_watched(recipe, "itm sweep")
    if (workers := recipe.train.workers) > 1:
        together = workers * recipe.train.batch_size
        raise ValueError(
            f"train.workers={workers}: a trial trains in one process, so that many run side by side; set train.workers=1 "
            f"(with train.batch_size={together} a step takes as many pairs)"
        )


def checked(folder: str, recipe: Recipe, asked: Asked, spaces: Sequence[Space]) -> Json:
    """What sweep.json holds, {} where there is none. Raises ValueError for a sweep of other choices."""
    uri = files.join(folder, "sweep.json")
    if not files.exists(uri):
        return {}
    said = read_json(uri, FORMAT)
    now = {
        "recipe_fingerprint": recipe.fingerprint(),
        "spaces": {space.key: str(space) for space in spaces},
        "seed": asked.seed,
        "metric": recipe.registry.metric,
    }
    for name, value in now.items():
        if said.get(name) != value:
            raise ValueError(
                f"{folder} holds another sweep: {name} was {said.get(name)}, is {value}; give the recipe another name=, or --overwrite it"
            )
    return said


def parent(recipe: Recipe, asked: Asked, spaces: Sequence[Space], started: Json) -> Tracker:
    """The MLflow run whose children the trials are: that of the sweep which goes on, or a new one."""
    if started.get("tracking_uri") == tracking_uri():
        return Tracker(started["run_id"], started["tracking_uri"], owner=True, system_metrics=False)
    params = {f"space.{space.key}": str(space) for space in spaces} | {"trials": asked.trials, "seed": asked.seed}
    tags = {"stage": "sweep", "recipe_fingerprint": recipe.fingerprint(), "git_commit": git_commit()}
    return Tracker.start(recipe.registry.experiment, f"{recipe.name}-sweep", params, tags)


def run_open(trials: list[Trial], waiting: list[Trial], asked: Asked, tracker: Tracker) -> dict[int, str]:
    """Have Ray Tune run the open trials; returns number -> why, of those that failed."""
    from pipelines.on_ray.session import connect

    connect()
    from pipelines.sweeping import tuned

    print(f"{len(waiting)} of {len(trials)} trials to run", flush=True)
    start = time.perf_counter()
    failed = tuned.run(trials, waiting, asked, tracker)
    print(f"{len(waiting) - len(failed)} trials in {time.perf_counter() - start:.0f} s", flush=True)
    return failed


def outcome(recipe: Recipe, trials: list[Trial], failed: dict[int, str], folder: str) -> Json:
    """The trials, and the winner among those that are finished, whose recipe is written. Raises ValueError where none is finished."""
    rows = [trial.said() | ({"state": "failed", "why": failed[trial.number]} if trial.number in failed else {}) for trial in trials]
    ended = [row for row in rows if row["state"] == "finished" and row["value"] is not None]
    if not ended:
        why = next(iter(failed.items()), None)
        raise ValueError("no trial of the sweep is finished" + (f"; trial {why[0]:03d}: {why[1]}" if why else ""))
    best = max(ended, key=lambda row: row["value"])
    uri = files.join(folder, "best.yaml")
    files.write_atomic(uri, winner(recipe, best, len(trials)).encode())
    return {"trials": rows, "best": best["number"], "recipe": uri}


def winner(recipe: Recipe, best: Json, of: int) -> str:
    """The recipe of the best trial, as `itm train -c` takes it."""
    metric, value, step = recipe.registry.metric, best["value"], best["step"]
    about = f"trial {best['number']:03d} of {of} of the sweep of {recipe.name}: validation {metric} {value:.4g} at step {step}"
    said = with_choices(recipe, best["choices"]).model_dump(mode="json", exclude_unset=True)
    return f"# {about}\n" + yaml.safe_dump(said | {"name": f"{recipe.name}-best", "about": about}, sort_keys=False, allow_unicode=True)


def forget(folder: str) -> None:
    """Delete what an earlier sweep wrote; sweep.json first, so that no half of it looks like one that goes on."""
    if files.exists(uri := files.join(folder, "sweep.json")):
        files.delete(uri)
    for name in files.walk(folder):
        files.delete(files.join(folder, name))


def _write(folder: str, said: Json) -> None:
    files.write_atomic(files.join(folder, "sweep.json"), json.dumps(said, indent=1).encode())


def _record(tracker: Tracker, said: Json, folder: str) -> None:
    """What the parent's page shows: a curve over trials, the winner, and both files."""
    for row in said["trials"]:
        if row["value"] is not None:
            tracker.metrics({f"sweep/{said['metric']}": row["value"]}, step=row["number"])
    best = said["trials"][said["best"]]
    tracker.tags({"sweep_best": f"{best['number']:03d}", "sweep_best_run": best["run_id"]})
    for name in ("sweep.json", "best.yaml"):
        tracker.text(files.read_bytes(files.join(folder, name)).decode(), name)
