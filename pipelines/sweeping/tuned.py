"""Ray Tune around trials: processes, which trials are stopped early, what becomes of failures. Imported after the session is there."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from itm.data import files
from itm.tracking.runs import Tracker, end_run
from pipelines.on_ray.errors import cause_of
from pipelines.on_ray.session import interruptible
from pipelines.on_ray.stream import decoders
from pipelines.sweeping.inside import run_trial
from pipelines.sweeping.trials import Asked, Trial

# Of asynchronous successive halving: at each rung a third goes on. Rungs are percents of a trial's steps, of which batch sizes make
# different numbers; the first is a ninth of them.
REDUCTION = 3
RUNGS = 2
QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1", "TUNE_MAX_PENDING_TRIALS_PG": "4"}


class Keeper(tune.Callback):
    """Marks the trials that the scheduler stopped, in their folders and in MLflow, and says how each ended."""

    def __init__(self, trials: dict[int, Trial], uri: str, metric: str) -> None:
        self.trials, self.uri, self.metric = trials, uri, metric

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self.trials[trial.config["number"]]
        if own.state == "open":
            own.stop()
            if own.run_id:  # its process ends without a chance to do it
                end_run(own.run_id, self.uri, "KILLED")
        print(line_of(own, self.metric), flush=True)


def line_of(trial: Trial, metric: str) -> str:
    """How a trial stands, in one line."""
    best = trial.best
    figure = f"{metric} {best['value']:.4g} at step {best['step']}" if best else "no validation yet"
    choices = ", ".join(f"{key}={value}" for key, value in trial.choices.items())
    return f"trial {trial.number:03d} {trial.state}: {figure}  ({choices})"


def scheduler_of(trials: list[Trial], whole: bool) -> TrialScheduler:
    """Successive halving that knows what the trials of before have told; with `whole` every trial trains to its end."""
    if whole:
        return FIFOScheduler()
    scheduler = ASHAScheduler("percent", "value", "max", max_t=100, grace_period=100 / REDUCTION**RUNGS, reduction_factor=REDUCTION)
    for trial in trials:
        if trial.state != "open":
            past: Any = SimpleNamespace(trial_id=f"past-{trial.number:03d}")  # all that this scheduler asks of a trial
            scheduler.on_trial_add(None, past)  # type: ignore[arg-type]
            for row in trial.reports:
                scheduler.on_trial_result(None, past, row)  # type: ignore[arg-type]
    return scheduler


def run(trials: list[Trial], waiting: list[Trial], asked: Asked, tracker: Tracker) -> dict[int, str]:
    """Run the open ones; returns number -> why, of those that failed. A lost process goes on from its checkpoint on another node."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    recipe, by_number = trials[0].recipe, {trial.number: trial for trial in trials}
    folder = recipe.output  # that of the sweep
    bound = tune.with_parameters(run_trial, trials=by_number, tracking_uri=tracker.uri, parent=tracker.run_id)
    gpu = recipe.train.use_gpu
    cpus = 1 + (decoders(recipe.data.decode_workers, gpu) if gpu else 0)
    tuner = tune.Tuner(
        tune.with_resources(bound, {"CPU": cpus, "GPU": int(gpu)}),
        param_space={"number": tune.grid_search([trial.number for trial in waiting])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler_of(trials, asked.whole),
            max_concurrent_trials=asked.at_once,
            reuse_actors=True,
            trial_name_creator=lambda trial: f"trial-{trial.config['number']:03d}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['number']:03d}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            failure_config=tune.FailureConfig(max_failures=recipe.train.max_failures),
            callbacks=[Keeper(by_number, tracker.uri, recipe.registry.metric)],
            verbose=0,
        ),
    )
    with interruptible():
        results = tuner.fit()
    failed = {
        result.config["number"]: str(cause_of(result.error))
        for result in map(results.__getitem__, range(len(results)))
        if result.error and result.config
    }
    for name in files.walk(files.join(folder, "tune")):
        files.delete(files.join(folder, "tune", name))
    return failed
