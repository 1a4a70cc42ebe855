"""A trial of a sweep: its recipe, its folder, and what that says of it. The files are the truth; Ray Tune is told what they hold.

<output>/<name>/sweep/<name>-003/               the folder of a training, as `itm train` makes it
<output>/<name>/sweep/<name>-003/reports.jsonl  one line a validation: step, percent of the steps, the metric of the gate
<output>/<name>/sweep/<name>-003/stopped.json   there where the sweep stopped the trial before its end
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from itm.config import Part, Recipe
from itm.data import files
from itm.data.formats import Json
from itm.tracking.runs import run_of
from pipelines.sweeping.spaces import with_choices

REPORTER = "pipelines.sweeping.inside:Reporter"


def sweep_folder(recipe: Recipe) -> str:
    return files.join(recipe.folder, "sweep")


@dataclass(frozen=True)
class Asked:
    """What the command line says of a sweep. at_once: most trials at a time, None = all there is room for; whole: stop none early."""

    spaces: Sequence[str]
    trials: int = 8
    seed: int = 0
    at_once: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class Trial:
    """number: from 0; choices: dotted key -> value; recipe: what it trains, with absolute paths."""

    number: int
    choices: dict[str, Any]
    recipe: Recipe

    @classmethod
    def of(cls, recipe: Recipe, number: int, choices: dict[str, Any]) -> Trial:
        """recipe: of the sweep, with absolute paths. It trains in one process, and tells its validations to Ray Tune."""
        own = with_choices(recipe, choices)
        metric = recipe.registry.metric
        loggers = [*own.registry.loggers, Part(kind=REPORTER, options={"metric": metric})]
        return cls(
            number,
            choices,
            own.model_copy(
                update={
                    "name": f"{recipe.name}-{number:03d}",
                    "output": sweep_folder(recipe),
                    "train": own.train.model_copy(update={"workers": 0, "min_workers": None}),
                    "registry": own.registry.model_copy(update={"loggers": loggers}),
                }
            ),
        )

    @property
    def folder(self) -> str:
        return self.recipe.folder

    @property
    def reports(self) -> list[Json]:
        return read_reports(self.folder)

    @property
    def state(self) -> str:
        """finished, stopped (by the sweep), or open."""
        if files.exists(files.join(self.folder, "run.json")):
            return "finished"
        return "stopped" if files.exists(files.join(self.folder, "stopped.json")) else "open"

    @property
    def best(self) -> Json | None:
        """The report of the best validation, the earliest of equal ones; None before the first."""
        return max(self.reports, key=lambda row: (row["value"], -row["step"]), default=None)

    @property
    def run_id(self) -> str | None:
        found = run_of(self.folder)
        return found[0] if found else None

    def stop(self) -> None:
        """Written by the driver when the sweep has no use for more of this trial."""
        files.write_atomic(files.join(self.folder, "stopped.json"), json.dumps({"reports": len(self.reports)}).encode())

    def said(self) -> Json:
        best = self.best or {}
        found = {"number": self.number, "choices": self.choices, "state": self.state, "folder": self.folder, "run_id": self.run_id}
        return found | {"value": best.get("value"), "step": best.get("step")}


def read_reports(folder: str) -> list[Json]:
    """The validations of a trial, oldest first."""
    uri = files.join(folder, "reports.jsonl")
    return [json.loads(line) for line in files.read_bytes(uri).decode().splitlines()] if files.exists(uri) else []
