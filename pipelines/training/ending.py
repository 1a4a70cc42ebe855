"""When a run ends before its last step: the metric of the gate rises no more, or the hours are over."""

from __future__ import annotations

from dataclasses import replace

import torch

from itm.config import Recipe
from itm.distributed import all_reduce_sum, rank
from itm.evaluation.metrics import retrieval_metrics
from itm.training.checkpoint import Waiting
from pipelines.training.rank import Rank

LESS_IS_BETTER = ("_medr", "_meanr")
HOUR = 3600.0


def metrics_that_rise() -> list[str]:
    """Names of what every validation measures and more of is better."""
    one = torch.ones(1, 1)
    return [name for name in retrieval_metrics(one, one.bool()) if not name.endswith(LESS_IS_BETTER)]


def check_watched(recipe: Recipe, who: str) -> None:
    """Raises ValueError where `who` (train.patience, or a sweep) would wait for what no validation measures."""
    if not recipe.data.val_split:
        raise ValueError(f"{who} counts on validations, and data.val_split is empty: name a split")
    if recipe.registry.metric not in (known := metrics_that_rise()):
        raise ValueError(
            f"{who} watches registry.metric, and {recipe.registry.metric!r} is not what validations measure with more as better: "
            f"take one of {', '.join(known)}"
        )


def waited_for(before: Waiting | None, recipe: Recipe, metrics: dict[str, float]) -> Waiting | None:
    """The count of `train.patience` after a validation; None where the recipe has no patience."""
    metric = recipe.registry.metric
    if recipe.train.patience is None:
        return None
    if before is None or before.metric != metric or metrics[metric] > before.best:
        return Waiting(metric, metrics[metric])
    return replace(before, validations=before.validations + 1)


class Ending:
    """Whether a run ends after a step, for `Hooks.ends`: what rank 0 finds, told to all. why: set where it does."""

    def __init__(self, here: Rank) -> None:
        self.here, self.why = here, ""

    def __call__(self, done: int) -> bool:
        """Looked at with logged steps (hours) and validations (patience); never after the last step, which needs no reason."""
        here, train = self.here, self.here.job.recipe.train
        looked_at = (train.max_hours and here.course.logs(done)) or (train.patience and here.course.validates(done))
        if self.why or not looked_at or done == here.course.steps:
            return bool(self.why)
        reasons = self._reasons(here.clock.total)
        found = next((number for number, why in enumerate(reasons, 1) if why), 0) if rank() == 0 else 0
        told = int(all_reduce_sum(torch.tensor(float(found), device=here.step.device)))
        self.why = (reasons[told - 1] or "rank 0 said so") if told else ""
        return bool(self.why)

    def before_its_first_step(self) -> bool:
        """Whether the run had ended at its checkpoint; the process was lost before it could finish."""
        self.why = next(filter(None, self._reasons(self.here.state.seconds)), "")
        return bool(self.why)

    def _reasons(self, seconds: float) -> list[str]:
        """'' for each that does not hold."""
        train, waiting = self.here.job.recipe.train, self.here.state.waiting
        late = train.max_hours is not None and seconds >= train.max_hours * HOUR
        vain = train.patience is not None and waiting is not None and waiting.validations >= train.patience
        return [
            f"train.max_hours={train.max_hours:g} are over" if late else "",
            f"{waiting.metric} has not risen above {waiting.best:.4g} in {waiting.validations} validations (train.patience)"
            if vain and waiting
            else "",
        ]
