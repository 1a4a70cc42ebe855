"""Where else the figures of a run go, beside its MLflow run: `registry.loggers`. A new logger costs one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from itm.config import Recipe
from itm.kinds import Kinds, build_part, find_part


class Logger:
    """What every logger is: told what the MLflow run is told, after it. A subclass overrides what it cares for."""

    def __init__(self, *, name: str, run_id: str, folder: str) -> None:
        """name: of the recipe; run_id: of the MLflow run; folder: of the run, a path or URI."""
        self.name, self.run_id, self.folder = name, run_id, folder

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def tags(self, values: Mapping[str, object]) -> None: ...

    def artifact(self, path: str) -> None:
        """A local file, or a folder, that is kept with the run."""

    def close(self) -> None:
        """Nothing follows in this process."""


class Console(Logger):
    """A line on standard output for each set of metrics."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        print(f"{self.name} step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)


LOGGERS: Kinds[Logger] = Kinds(
    "itm.tracking.loggers:Logger", {"console": "itm.tracking.loggers:Console", "tensorboard": "itm.tracking.tensorboard:TensorBoard"}
)


def check_loggers(recipe: Recipe) -> None:
    """Raises ValueError for an unknown kind; no logger is opened."""
    for part in recipe.registry.loggers:
        find_part(LOGGERS, part.kind, "logger")


def loggers_of(recipe: Recipe, run_id: str) -> list[Logger]:
    """Those that the recipe names, for its MLflow run. Raises ValueError for an unknown kind or option."""
    about = {"name": recipe.name, "run_id": run_id, "folder": recipe.folder}
    return [build_part(LOGGERS, part.kind, part.options, "logger", **about) for part in recipe.registry.loggers]
