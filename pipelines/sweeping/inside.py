"""What runs in a process of Ray Tune: a trial trains as `itm train` trains, and tells each validation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from itm.data import files
from itm.data.formats import Json
from itm.tracking.loggers import Logger
from pipelines.sweeping.trials import Trial, read_reports

LAST = "ITM_TRIAL_STEPS"  # the last step of the trial that runs in this process


class Reporter(Logger):
    """Keeps the metric of the gate of each validation with the trial, then tells it to Ray Tune, which may stop the trial there.

    The last one is told by the driver, from the file: a trial that is stopped at its last step would leave no matcher. A validation that is
    made again after a restart is not told again.
    """

    def __init__(self, *, name: str, run_id: str, folder: str, metric: str) -> None:
        super().__init__(name=name, run_id=run_id, folder=folder)
        self.metric, self.last = metric, int(os.environ.get(LAST, "0"))
        self.rows = read_reports(folder)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        value = values.get(f"val/{self.metric}")
        if value is None or any(row["step"] >= step for row in self.rows):
            return
        self.rows.append({"step": step, "percent": 100.0 * step / self.last if self.last else 0.0, "value": float(value)})
        rows = "".join(json.dumps(row) + "\n" for row in self.rows)
        files.write_atomic(files.join(self.folder, "reports.jsonl"), rows.encode())
        if step < self.last:
            tell(self.rows[-1])


def tell(row: Json) -> None:
    from ray import tune

    tune.report({"percent": row["percent"], "value": row["value"]})


def run_trial(config: Json, trials: dict[int, Trial], tracking_uri: str, parent: str) -> None:
    """config: the number of a trial; parent: the MLflow run of the sweep. What an interrupted trial had told is told again first."""
    from pipelines.training.course import Course
    from pipelines.training.driver import train
    from pipelines.training.preparation import training_manifest

    trial = trials[config["number"]]
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri  # this process works in a folder of Ray Tune
    os.environ[LAST] = str(Course.of(trial.recipe, training_manifest(trial.recipe)).steps)
    for row in trial.reports:
        if row["percent"] < 100:
            tell(row)
    train(trial.recipe, tags={"mlflow.parentRunId": parent, "sweep_trial": f"{trial.number:03d}"})
