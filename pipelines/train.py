"""Train a matcher on packed shards: Ray Data streams the planned pairs, Ray Train steps, MLflow records.

    itm train -c demo.yaml                                        # one worker
    itm train -c demo.yaml train.workers=2 train.steps=200        # two, same order of pairs
    itm train -c demo.yaml train.workers=0                        # inside this process, without Ray

Writes below <output>/<name>: matcher/ (the best weights by validation rSum), losses.jsonl, checkpoints/, quarantine-<rank>.jsonl (if any
pair could not be used) and, last, run.json. A finished run is not run again; one that was interrupted goes on from its newest checkpoint,
also with another number of workers. --overwrite starts afresh. data.val_split="''" (empty) trains without validation and keeps the last
weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import itm
from itm.config import Recipe
from itm.data import files
from itm.data.formats import read_json
from itm.data.manifest import Manifest, check_present
from itm.data.plan import Plan
from itm.data.preprocess import ImageInput, Inputs, decode, read_regions
from itm.data.records import Problem
from itm.data.shards import Sample, read_manifest, read_samples
from itm.data.sidecar import Store
from itm.data.text import build_tokenizer
from itm.matchers.folder import save_matcher
from itm.precision import warn_if_slow
from itm.tracking.lineage import DatasetRef, git_commit
from itm.tracking.registry import Tracker, tracking_uri
from itm.training.cached import check_cached
from itm.training.compiled import check_compiler
from pipelines.cli import recipe_arguments, recipe_from
from pipelines.on_ray.progress import Board, watched
from pipelines.on_ray.stream import PrepareActor
from pipelines.teach import store_for
from pipelines.training.worker import START, Job, absolute, build_method, last_step, work

FORMAT = 1  # of run.json and started.json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="forget an earlier run in the same folder")


def run(args: argparse.Namespace) -> None:
    done = train(recipe_from(args), overwrite=args.overwrite)
    best = done["best"]
    print(f"{done['steps']} steps in {done['seconds']:.0f} s ({done['samples_per_s']:.0f} pairs/s), MLflow run {done['run_id']}")
    print(
        f"best validation rSum {best['metrics']['rsum']:.1f} at step {best['step']}" if best else "no validation split: last weights kept"
    )
    print(f"matcher: {done['matcher']}")


def train(recipe: Recipe, overwrite: bool = False) -> dict[str, Any]:
    """Run, resume or recognise a run; returns what run.json holds. Raises ValueError, before any work, for what cannot run."""
    if recipe.evaluation.ensemble:
        members = ", ".join(recipe.evaluation.ensemble)
        raise ValueError(f"{recipe.name} is an ensemble of {members}: train those, then run `itm evaluate` with this recipe")
    identity, given = recipe.fingerprint(), recipe
    recipe = located(recipe)
    files.check_writable(recipe.folder)
    if overwrite:
        forget(recipe.folder)
    for folder in (recipe.folder, files.join(recipe.folder, "checkpoints")):
        files.remove_abandoned(folder)
    manifest = read_manifest(files.join(recipe.data.root, recipe.data.train_split))
    finished, started = (_read(files.join(recipe.folder, name)) for name in ("run.json", "started.json"))
    _check_same(recipe.folder, (finished, started), given, manifest)
    if finished:
        print(f"{recipe.folder} is finished (run {finished['run_id']}); --overwrite trains it again")
        return finished
    job = prepare(recipe, manifest)
    teachers = {modality: store.teacher for modality, store in job.stores.items()}
    about = {"recipe_fingerprint": identity, "manifest": manifest.fingerprint(), "teachers": teachers, "git_commit": git_commit()}
    with tracked(job, about, started) as tracker:
        job = Job(**vars(job) | {"run_id": tracker.run_id, "tracking_uri": tracker.uri})
        summary = execute(job)
        done = {"format": FORMAT, "run_id": tracker.run_id, "name": recipe.name, **about, **summary}
        done["matcher"] = files.join(recipe.folder, "matcher")
        files.write_atomic(files.join(recipe.folder, "run.json"), json.dumps(done, indent=1).encode())
        flow = {name: float(summary[name]) for name in ("rows_in", "rows_out", "rows_rejected")}
        flow |= {"samples_per_s_mean": summary["samples_per_s"], "train_seconds": summary["seconds"]}
        tracker.metrics(flow, step=summary["steps"])
    return done


def located(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, for processes with another working directory."""
    data = recipe.data.model_copy(update={"root": absolute(recipe.data.root)})
    text = recipe.text
    if text.path and Path(text.path).exists():
        text = text.model_copy(update={"path": absolute(text.path)})
    return recipe.model_copy(update={"data": data, "text": text, "output": absolute(recipe.output)})


def prepare(recipe: Recipe, manifest: Manifest) -> Job:
    """Everything that can be refused is refused here: too few pairs, a missing store or split, a method that the model cannot serve."""
    data, train = recipe.data, recipe.train
    split = files.join(data.root, data.train_split)
    if data.val_split:
        try:
            read_manifest(files.join(data.root, data.val_split))
        except ValueError as error:
            raise ValueError(f"{error}; or train without validation: data.val_split=") from None
    ranks = max(1, train.workers)
    plan = Plan.of(manifest, seed=recipe.seed, batch=train.batch_size, ranks=ranks, accumulate=train.accumulate, window=data.shuffle_window)
    steps = last_step(train, plan)
    check_present(split, manifest)
    captions = captions_of(split, manifest) if recipe.text.kind == "words" and not recipe.text.path and not train.start else None
    image, first = ImageInput.of(data), first_sample(split, manifest, data.image)
    if first and image.kind == "regions":
        image = replace(image, region_width=read_regions(first[0], 1)["regions"].shape[1])
    tokenizer = started_from(recipe).inputs.tokenizer if train.start else build_tokenizer(recipe.text, captions)
    inputs = Inputs(image, tokenizer)
    method = build_method(recipe, inputs)
    if not train.use_gpu:
        warn_if_slow(train.precision, torch.device("cpu"))
    if train.compile and not train.use_gpu:
        check_compiler(torch.device("cpu"))
    if first:
        try_out(method.matcher, inputs, first)  # type: ignore[arg-type]
    if first and train.cache_chunk is not None:
        check_cached(method.matcher, inputs.images([first[0]] * 2), inputs.captions([first[1]] * 2))  # type: ignore[arg-type]
    stores = {modality: store_of(recipe, manifest, modality) for modality in method.needs_teacher}  # type: ignore[union-attr]
    return Job(recipe, manifest, plan, inputs, stores, steps, run_id="", tracking_uri="")


def try_out(matcher: nn.Module, inputs: Inputs, first: tuple[bytes, str]) -> None:
    """Encode one pair, without a trace in the matcher. Raises ValueError where its sizes do not fit the data: before a worker starts."""
    training = matcher.training
    with torch.no_grad():
        matcher.eval()
        matcher.encode_images(inputs.images([first[0]]))  # type: ignore[operator]
        matcher.encode_captions(inputs.captions([first[1]]))  # type: ignore[operator]
    matcher.train(training)


def started_from(recipe: Recipe) -> Any:
    """The matcher that the run fine-tunes, as it was when the run began."""
    kept = files.join(recipe.folder, START)
    if not files.exists(files.join(kept, "config.json")):
        save_matcher(itm.load_matcher(str(recipe.train.start)), kept)
    return itm.load_matcher(kept)


def captions_of(split: str, manifest: Manifest) -> Iterator[str]:
    for shard in manifest.shards:
        for item in read_samples(files.join(split, shard.name)):
            if isinstance(item, Sample):
                yield from (caption.text for caption in item.captions)


def first_sample(split: str, manifest: Manifest, kind: str) -> tuple[bytes, str] | None:
    """(image or region bytes, caption) of the first sample that has what the recipe trains on."""
    for shard in manifest.shards:
        for item in read_samples(files.join(split, shard.name)):
            data = None if isinstance(item, Problem) else item.regions if kind == "regions" else item.image
            with suppress(ValueError):
                if isinstance(item, Sample) and data is not None and (decode(data) if kind == "pixels" else read_regions(data, 1)):
                    return data, item.captions[0].text
    return None


def store_of(recipe: Recipe, manifest: Manifest, modality: str) -> Store:
    """The finished store of the recipe's teacher, which must have scored every shard. Raises ValueError with the remedy."""
    if getattr(recipe.teachers, modality) is None:
        raise ValueError(f"method {recipe.method.kind!r} needs {modality} teacher vectors: set teachers.{modality} and run `itm teach`")
    store = store_for(recipe, recipe.data.train_split, modality)
    store.check((shard.name, shard.sha256) for shard in manifest.shards)
    return store


@contextmanager
def tracked(job: Job, about: dict[str, Any], started: dict[str, Any] | None) -> Iterator[Tracker]:
    """The MLflow run of this training: a new one, or that of the interrupted run it continues."""
    recipe = job.recipe
    if started and started["tracking_uri"] == tracking_uri():
        tracker = Tracker(started["run_id"], started["tracking_uri"], owner=True, system_metrics=True)
    else:
        source = job.split(recipe.data.train_split)
        tracker = Tracker.start(
            recipe.registry.experiment,
            recipe.name,
            recipe.flat(),
            {"stage": "train", **about},
            [DatasetRef(f"{recipe.name}-{recipe.data.train_split}", job.manifest.fingerprint(), source)],
            system_metrics=True,
        )
        said = {"format": FORMAT, "run_id": tracker.run_id, "tracking_uri": tracker.uri, **about, "recipe": recipe.model_dump(mode="json")}
        files.write_atomic(files.join(recipe.folder, "started.json"), json.dumps(said, indent=1).encode())
    with tracker:
        yield tracker


def execute(job: Job) -> dict[str, Any]:
    train = job.recipe.train
    with tqdm(total=job.steps, desc=f"train {job.recipe.name}", unit="step", mininterval=1) as bar:

        def show(done: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update(done - bar.n)

        if train.workers:
            return execute_on_ray(job, show)
        device = torch.device("cuda" if train.use_gpu else "cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # torch's threads spin: with the decoding threads they would fight for cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) - job.recipe.data.decode_workers))
        return work(job, device, show)


def execute_on_ray(job: Job, show: Callable[[int, float], None]) -> dict[str, Any]:
    """A Ray Train worker group; it is restarted from the newest checkpoint up to `train.max_failures` times.

    With `train.min_workers` the group shrinks when no other node takes the place of a dead one, and grows when there is room again.
    """
    from pipelines.on_ray.session import connect

    connect()
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    train = job.recipe.train
    check_room(job.recipe, ray.cluster_resources().get("CPU", 0.0))
    # On the driver's node: elsewhere it would die with a node whose workers can be replaced, and take the run with it.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    board = ray.remote(num_cpus=0, label_selector=here)(Board).remote()
    workers = (train.min_workers, train.workers) if train.min_workers else train.workers
    trainer = TorchTrainer(
        worker_entry,  # type: ignore[arg-type]
        train_loop_config={"job": job, "board": board},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=train.use_gpu),  # type: ignore[arg-type]  # as well
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Train V1
            name=f"train-{uuid.uuid4().hex[:8]}",  # a name of its own: Ray Train would resume an equal one, which is our part
            storage_path=files.join(job.folder, "ray"),
            failure_config=FailureConfig(max_failures=train.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    with watched(board, show):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise cause_of(error) from None
    summary: dict[str, Any] = result.return_value  # type: ignore[attr-defined]
    return summary


def check_room(recipe: Recipe, cpus: float) -> None:
    """Raises ValueError where trainers on CPUs would leave none to the actors that decode for them, and both wait for ever."""
    train, data = recipe.train, recipe.data
    wanted = train.workers * (1 + PrepareActor.CPUS * data.decode_workers)
    if data.decode == "actors" and not train.use_gpu and train.workers <= cpus < wanted:
        raise ValueError(
            f"train.workers={train.workers} and their decoding actors need {wanted:g} CPUs, the cluster has {cpus:g}: "
            "set data.decode=trainer, or start another node"
        )


def worker_entry(config: dict[str, Any]) -> dict[str, Any]:
    from ray.train.torch import get_device

    board = config["board"]
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # ranks on one machine would fight for its cores
    return work(config["job"], get_device(), lambda done, loss: board.put.remote(done, loss))


def cause_of(error: Exception) -> Exception:
    """A ValueError that a worker raised for the user, else Ray's own report."""
    for failure in getattr(error, "worker_failures", {}).values():
        inner = getattr(failure, "cause", failure)
        if isinstance(inner, ValueError):
            return ValueError(str(inner))
    return error


def forget(folder: str) -> None:
    """Delete what an earlier run wrote; run.json first, so that no half of it looks finished."""
    for name in ("run.json", "started.json", "losses.jsonl"):
        if files.exists(uri := files.join(folder, name)):
            files.delete(uri)
    inner = [uri for name in ("checkpoints", START) for uri in files.list_files(files.join(folder, name))]
    for uri in (*inner, *files.list_files(folder, ".jsonl")):
        files.delete(uri)


def _read(uri: str) -> dict[str, Any] | None:
    return read_json(uri, FORMAT) if files.exists(uri) else None


def _check_same(folder: str, earlier: tuple[dict[str, Any] | None, ...], recipe: Recipe, manifest: Manifest) -> None:
    """Raises ValueError when run.json or started.json (None: not there) tell of other choices or of other data."""
    recorded = next((said["recipe"] for said in earlier if said and "recipe" in said), None)
    same: dict[str, list[str | None]] = {
        "recipe_fingerprint": [recipe.fingerprint(), recipe.whole_fingerprint(recorded) if recorded else None],
        "manifest": [manifest.fingerprint()],
    }
    for said in filter(None, earlier):
        for what, values in same.items():
            if said[what] not in values:
                raise ValueError(
                    f"{folder} holds a run with {what} {said[what]}, this one has {values[0]}; give the run another name=, or --overwrite"
                )


if __name__ == "__main__":
    import sys

    from pipelines.cli import stage_main

    sys.exit(stage_main("train"))
