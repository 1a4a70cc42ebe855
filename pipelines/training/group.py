"""The worker group of Ray Train: started for a job, watched while it trains, its errors told as the user's own."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from typing import Any

import torch

from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json
from itm.device import resolve_device
from pipelines.on_ray.errors import cause_of
from pipelines.on_ray.feeding import away_from_feeders
from pipelines.on_ray.gpus import LABEL, awaited, most_gpus, why_no_cuda
from pipelines.on_ray.progress import Board, watched
from pipelines.on_ray.reach import confirm, shared
from pipelines.on_ray.session import interruptible
from pipelines.on_ray.stream import PrepareActor, decoders
from pipelines.training.job import Job
from pipelines.training.startup import StartUp
from pipelines.training.worker import work


def run_group(job: Job, show: Callable[[int, str, dict[str, float] | None], None], startup: StartUp) -> Json:
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
    startup.reached("Ray")
    config: dict[str, Any] = {"job": job, "board": board, "startup": startup}
    trainer = TorchTrainer(
        worker_entry,  # type: ignore[arg-type]
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # as well
            use_gpu=train.use_gpu,
            label_selector=away_from_feeders(ray.nodes()),  # type: ignore[call-arg]  # of V2
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Train V1
            name=f"train-{uuid.uuid4().hex[:8]}",  # a name of its own: Ray Train would resume an equal one, which is our part
            storage_path=files.join(job.folder, "ray"),
            failure_config=FailureConfig(max_failures=train.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    data = job.recipe.data
    roots = {f"data.mix.{number}.root": one.root for number, one in enumerate(data.mix)} or {"data.root": data.root}
    with shared({"output": job.folder}, roots) as config["tokens"], watched(board, show), interruptible():
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise cause_of(error) from error
    summary: Json = result.return_value  # type: ignore[attr-defined]
    return summary


def check_room(recipe: Recipe, cpus: float) -> None:
    """Raises ValueError where trainers on CPUs would leave none to the actors that decode for them, and both wait for ever; and for more
    trainers than a session of this machine has CPUs: a cluster may grow, it cannot."""
    train, data = recipe.train, recipe.data
    least = train.min_workers or train.workers
    if not train.use_gpu and least > cpus > 0 and not os.environ.get("RAY_ADDRESS"):
        asked = f"train.min_workers={least}" if train.min_workers else f"train.workers={least}"
        raise ValueError(f"{asked} need as many CPUs, the session of this machine has {cpus:g} and would wait for ever: ask for fewer")
    wanted = train.workers * (1 + PrepareActor.CPUS * decoders(data.decode_workers, train.use_gpu))
    if data.decode == "actors" and not train.use_gpu and train.workers <= cpus < wanted:
        raise ValueError(
            f"train.workers={train.workers} and their decoding actors need {wanted:g} CPUs, the cluster has {cpus:g}: "
            "set data.decode=trainer, or start another node"
        )


def check_gpus(recipe: Recipe) -> None:
    """Before a run is recorded: raises ValueError where a training asks for GPUs that are not there and do not come, or without CUDA."""
    train = recipe.train
    if not train.use_gpu:
        return
    if not train.workers:
        try:
            resolve_device("cuda")
        except ValueError as error:
            raise ValueError(f"train.use_gpu=true: {error}; set train.use_gpu=false") from None
        return
    from pipelines.on_ray.session import connect

    connect()
    least, most = train.min_workers or train.workers, most_gpus()
    if most < least:
        asked = f"train.min_workers={least}" if train.min_workers else f"train.workers={least}"
        raise ValueError(
            f"train.use_gpu=true and {asked} need {least} GPUs, the cluster has {most} and would wait for ever: "
            f"set train.workers={most}"
            + ("" if most else " with train.use_gpu=false")
            + f", or add nodes (node label {LABEL}: those to come)"
        )
    awaited(least, least)
    if why := why_no_cuda():
        raise ValueError(f"train.use_gpu=true: {why}; set train.use_gpu=false")


def worker_entry(config: Json) -> Json:
    from ray.train.torch import get_device

    confirm(config["tokens"])
    board = config["board"]
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # ranks on one machine would fight for its cores
    startup: StartUp = config["startup"]
    startup.reached("workers")
    return work(config["job"], get_device(), board.put.remote, startup)
