"""The logger `tensorboard`: what the MLflow run is told as scalars, in event files that `tensorboard --logdir` shows."""

from __future__ import annotations

from collections.abc import Mapping

from itm.data import files
from itm.extras import needed_by
from itm.tracking.loggers import Logger


class TensorBoard(Logger):
    """to: a local folder, in which each run has one of its own; empty = `tensorboard` in the run's folder, which then has to be local."""

    def __init__(self, *, name: str, run_id: str, folder: str, to: str = "") -> None:
        super().__init__(name=name, run_id=run_id, folder=folder)
        place = files.join(to, name) if to else files.join(folder, "tensorboard")
        if files.is_remote(place):
            raise ValueError(f"tensorboard writes event files on this machine, not at {place}: set registry.loggers.options.to to a folder")
        with needed_by("registry.loggers tensorboard", "tensorboard"):
            from tensorboardX import SummaryWriter
        self.writer = SummaryWriter(files.absolute(place))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self.writer.close()
