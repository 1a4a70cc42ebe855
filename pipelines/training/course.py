"""The course of a run: which pairs each step takes, where the last step is, and what is due after each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from itm.config import Recipe, Train
from itm.data.manifest import Manifest
from itm.data.mix import Mixture, plan_of
from itm.data.plan import Plan, Position, expected_same_image_share, window_of
from itm.training.optim import learning_rate


@dataclass(frozen=True)
class Course:
    """The plan of the pairs from a position on, for the ranks that are there, and the step at which the run ends.

    It is made once, by the driver; a worker takes it up at its checkpoint, with as many ranks as there are.
    """

    train: Train
    plan: Plan
    steps: int

    @classmethod
    def of(cls, recipe: Recipe, manifest: Manifest | Mixture) -> Course:
        """Raises ValueError when there are fewer pairs than one step takes, and when the recipe does not say how long to train."""
        train, ranks = recipe.train, max(1, recipe.train.workers)
        plan = plan_of(
            manifest,
            seed=recipe.seed,
            batch=train.batch_size,
            ranks=ranks,
            accumulate=train.accumulate,
            window=window_of(manifest, recipe.data.shuffle_window, recipe.data.shuffle_pairs),
        )
        return cls(train, plan, _last_step(train, plan))

    def same_image_share(self, manifest: Manifest | Mixture) -> float:
        """Expected share of the pairs of a rank's batch whose image is in it twice (`expected_same_image_share`)."""
        together = min(1.0, self.plan.window / len(manifest.shards))
        pairs, images = (max(1, round(count * together)) for count in (manifest.captions, manifest.samples))
        return expected_same_image_share(pairs, images, self.plan.batch)

    def taken_up(self, position: Position, ranks: int) -> Course:
        """The same pairs in the same order from `position` on, which may be shared by another number of ranks."""
        plan = replace(self.plan, ranks=ranks).resume(position)
        return Course(self.train, plan, _last_step(self.train, plan))

    def rate(self, step: int) -> float:
        """The learning rate of a step.

        Where passes end the run they drive the schedule too: a step of other workers is another share of a pass.
        """
        plan, end = self.plan, self.steps
        if self.train.epochs and not self.train.steps:
            at, end = plan.locate(step), self.train.epochs * plan.steps_per_epoch
            step = at.epoch * plan.steps_per_epoch + at.offset // plan.global_batch
        return learning_rate(self.train, step, plan.steps_per_epoch, end)

    def logs(self, done: int) -> bool:
        return done % self.train.log_every == 0 or done == self.steps

    def validates(self, done: int) -> bool:
        every = self.train.validate_every
        return done == self.steps or (done % every == 0 if every else self._ends_epoch(done))

    def checkpoints(self, done: int) -> bool:
        every = self.train.checkpoint_every
        return done == self.steps or (done % every == 0 if every else self.validates(done))

    def _ends_epoch(self, done: int) -> bool:
        return self.plan.locate(done).epoch > self.plan.locate(done - 1).epoch


def _last_step(train: Train, plan: Plan) -> int:
    """Steps of the whole run when the ranks of `plan` take it to its end; passes over the captions last as many pairs for any of them.

    Raises ValueError when the recipe does not say how long to train.
    """
    ends = [train.steps] if train.steps else []
    if train.epochs:
        passes = (plan.pairs - plan.start.offset) // plan.global_batch + (train.epochs - plan.start.epoch - 1) * plan.steps_per_epoch
        ends.append(plan.start.step + max(0, passes))
    if not ends:
        raise ValueError("the recipe does not say how long to train: set train.steps or train.epochs")
    return min(ends)
