"""The driver of `itm train`: it recognises or opens the run, has the workers train, and writes the receipt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
import yaml

from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json, read_json
from itm.data.lease import held
from itm.data.manifest import Manifest
from itm.data.mix import Mixture, parts_of
from itm.data.patience import ASKED
from itm.device import resolve_device
from itm.environment import environment
from itm.progress import Progress
from itm.tracking.addresses import check_alive, tracking_uri
from itm.tracking.lineage import DatasetRef, git_commit, packages_used
from itm.tracking.runs import DESCRIPTION, RECIPE, Tracker
from pipelines.on_ray.stream import decoders
from pipelines.training import FORMAT
from pipelines.training.earlier import begun, check_same
from pipelines.training.group import check_gpus, run_group
from pipelines.training.job import START, Job
from pipelines.training.preparation import prepare, training_manifest
from pipelines.training.startup import StartUp
from pipelines.training.worker import work


def train(recipe: Recipe, overwrite: bool = False, startup: StartUp | None = None, tags: Mapping[str, str] | None = None) -> Json:
    """Run, resume or recognise a run; returns what run.json holds. Raises ValueError, before any work, for what cannot run.

    tags: more of them, for the MLflow run.
    """
    startup = startup or StartUp()
    startup.reached("imports")
    if recipe.evaluation.ensemble:
        members = ", ".join(recipe.evaluation.ensemble)
        raise ValueError(f"{recipe.name} is an ensemble of {members}: train those, then run `itm evaluate` with this recipe")
    folder = located(recipe).folder
    files.check_writable(folder)
    with held(folder, "train"):
        return _train(recipe, overwrite, startup, tags)


def _train(given: Recipe, overwrite: bool, startup: StartUp, tags: Mapping[str, str] | None) -> Json:
    """As `train`, of a folder in which no other driver is at work."""
    identity, recipe = given.fingerprint(), located(given)
    if overwrite:
        forget(recipe.folder)
    for folder in (recipe.folder, files.join(recipe.folder, "checkpoints")):
        files.remove_abandoned(folder)
    manifest = training_manifest(recipe)
    finished, started = (_read(files.join(recipe.folder, name)) for name in ("run.json", "started.json"))
    try:
        longer = check_same(recipe.folder, (finished, started), given, recipe, manifest)
    except ValueError:
        if finished or begun(recipe.folder):
            raise
        forget(recipe.folder)  # a start that failed: nothing was learned that another choice could spoil
        longer, started = False, None
    if finished and not longer:
        ended = f"; it ended because {finished['ended']}" if finished.get("ended") else ""
        print(f"{recipe.folder} is finished (run {finished['run_id']}){ended}; more steps go on from there, --overwrite trains it again")
        return finished
    check_alive()
    check_gpus(recipe)
    job = _prepared(recipe, manifest, started)
    startup.reached("checks")
    about = {"recipe_fingerprint": identity, "manifest": manifest.fingerprint(), "teachers": job.teachers, "git_commit": git_commit()}
    if longer:
        started = _lengthened(job, finished, started, about)
    share = job.course.same_image_share(manifest)
    print(f"batches: {share:.2%} of the pairs are expected with another pair of their image beside them")
    with tracked(job, about, started, tags) as tracker:
        job = replace(job, run_id=tracker.run_id, tracking_uri=tracker.uri)
        startup.reached("MLflow")
        summary = execute(job, tracker.say, startup)
        done = {"format": FORMAT, "run_id": tracker.run_id, "tracking_uri": tracker.uri, "name": recipe.name, **about, **summary}
        done["environment"] = environment()
        done["matcher"] = files.join(recipe.folder, "matcher")
        files.write_atomic(files.join(recipe.folder, "run.json"), json.dumps(done, indent=1).encode())
        names = ("rows_in", "rows_out", "rows_rejected", "samples_per_s", "seconds")
        tracker.metrics({f"train/{name}": float(summary[name]) for name in names}, step=summary["steps"])
        for uri in files.list_files(recipe.folder, ".jsonl"):
            with files.local_copy(uri) as kept:
                tracker.artifact(kept, "log")
    return done


def finished(recipe: Recipe) -> Json | None:
    """What run.json holds, if it is of this recipe and of the training split as it is now; else None."""
    receipt = _read(files.join(recipe.folder, "run.json"))
    if receipt is None:
        return None
    try:
        manifest = training_manifest(recipe)
        longer = check_same(recipe.folder, (receipt, _read(files.join(recipe.folder, "started.json"))), recipe, located(recipe), manifest)
    except ValueError:  # another run, or no training split: `train` says which
        return None
    return None if longer else receipt


def _prepared(recipe: Recipe, manifest: Manifest | Mixture, started: Json | None) -> Job:
    """As `prepare`; a start that is refused leaves nothing that the next one, of other choices, would take up."""
    try:
        return prepare(recipe, manifest)
    except Exception:
        if started is None:
            forget(recipe.folder)
        raise


def _lengthened(job: Job, finished: Json | None, started: Json | None, about: Json) -> Json:
    """Let a run go on for more steps: started.json tells of the new length before run.json, which tells of the old one, goes.

    Raises ValueError when the run has more steps behind it than are asked for.
    """
    behind, folder = finished["steps"] if finished else 0, job.recipe.folder
    if job.course.steps <= behind:
        raise ValueError(
            f"{folder} has {behind} steps behind it, this recipe ends at {job.course.steps}: ask for more train.steps or train.epochs, "
            "give the run another name=, or --overwrite to start afresh"
        )
    assert started is not None
    said = started | about | {"recipe": job.recipe.model_dump(mode="json")}
    files.write_atomic(files.join(folder, "started.json"), json.dumps(said, indent=1).encode())
    if finished:
        files.delete(files.join(folder, "run.json"))
        print(f"{folder} goes on from step {behind} to {job.course.steps}")
    return said


def flow_line(done: Json) -> str:
    """Pairs trained on and rejected, and the samples and captions that these were, each once; `done` = what run.json holds."""
    folder = done["matcher"].removesuffix("/matcher")
    lists = [uri for uri in files.list_files(folder, ".jsonl") if files.name_of(uri).startswith("quarantine-")]
    rows = {line: json.loads(line) for uri in lists for line in files.read_bytes(uri).decode().split("\n") if line}
    captions = sum(said["what"] == "caption" for said in rows.values())
    samples = len({(said["shard"], said["key"]) for said in rows.values() if said["what"] != "caption"})
    return (
        f"{done['rows_in']:,} pairs = {done['rows_out']:,} trained on + {done['rows_rejected']:,} rejected "
        f"({samples:,} images and {captions:,} captions of other images could not be used)"
    )


def located(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, for processes with another working directory."""
    mix = [one.model_copy(update={"root": files.absolute(one.root)}) for one in recipe.data.mix]
    data = recipe.data.model_copy(update={"root": files.absolute(recipe.data.root), "mix": mix})
    text = recipe.text
    if text.path and files.exists(text.path):
        text = text.model_copy(update={"path": files.absolute(text.path)})
    return recipe.model_copy(update={"data": data, "text": text, "output": files.absolute(recipe.output)})


@contextmanager
def tracked(job: Job, about: Json, started: Json | None, tags: Mapping[str, str] | None = None) -> Iterator[Tracker]:
    """The MLflow run of this training: a new one, or that of the interrupted run it continues."""
    recipe = job.recipe
    if started and started["tracking_uri"] == tracking_uri():
        tracker = Tracker(started["run_id"], started["tracking_uri"], owner=True, system_metrics=True)
    else:
        name, held = f"{recipe.name}-{recipe.data.train_split}", parts_of(job.split(recipe.data.train_split), job.manifest)
        if started:
            print(f"this run was recorded in {started['tracking_uri']}; from here on it is recorded in {tracking_uri()}, as a new run")
        tracker = Tracker.start(
            recipe.registry.experiment,
            recipe.name,
            recipe.flat(),
            {"stage": "train", **about, **packages_used(recipe.model_dump(mode="json"))},
            [DatasetRef(name, manifest.fingerprint(), uri) for uri, manifest in held],
            system_metrics=True,
        )
        said = {"format": FORMAT, "run_id": tracker.run_id, "tracking_uri": tracker.uri, **about, "recipe": recipe.model_dump(mode="json")}
        files.write_atomic(files.join(recipe.folder, "started.json"), json.dumps(said, indent=1).encode())
    tracker.text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), RECIPE)
    tracker.tags({DESCRIPTION: about_run(job), **(tags or {})})
    with tracker:
        yield tracker


def about_run(job: Job) -> str:
    """The description of the run on its MLflow page."""
    recipe, manifest = job.recipe, job.manifest
    rows = {
        "model": f"{recipe.model.kind}, trained by `{recipe.method.kind}`",
        "data": f"{job.split(recipe.data.train_split)} {manifest.fingerprint()}",
        "size": f"{manifest.samples:,} images, {manifest.captions:,} captions",
        "teachers": ", ".join(f"{modality}: {teacher}" for modality, teacher in job.teachers.items()) or "none",
        "steps": f"{job.course.steps:,}, the matcher is kept in {recipe.folder}/matcher",
    }
    return "\n\n".join(filter(None, [recipe.about, "\n".join(f"- {name}: {text}" for name, text in rows.items())]))


def execute(job: Job, say: Callable[[str], None], startup: StartUp) -> Json:
    """say: is told a line at each logged step."""
    train = job.recipe.train
    with Progress(f"train {job.recipe.name}", job.course.steps, "step", every=0) as progress:

        def show(done: int, text: str, values: dict[str, float] | None = None) -> None:
            progress.to(done, text, values)
            say(f"step {done} of {job.course.steps}, {text}")

        if train.workers:
            summary = run_group(job, show, startup)
            ASKED.add(summary.get("store_waited_s", 0.0), summary.get("store_asked_again", 0))
            return summary
        device = resolve_device("cuda") if train.use_gpu else torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # torch's threads spin: with the decoding threads they would fight for cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) - decoders(job.recipe.data.decode_workers, train.use_gpu)))
        return work(job, device, show, startup)


def forget(folder: str) -> None:
    """Delete what an earlier run wrote; run.json first, so that no half of it looks finished."""
    for name in ("run.json", "started.json", "losses.jsonl"):
        if files.exists(uri := files.join(folder, name)):
            files.delete(uri)
    inner = [uri for name in ("checkpoints", START) for uri in files.list_files(files.join(folder, name))]
    for uri in (*inner, *files.list_files(folder, ".jsonl")):
        files.delete(uri)


def _read(uri: str) -> Json | None:
    return read_json(uri, FORMAT) if files.exists(uri) else None
