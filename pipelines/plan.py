"""What `itm run` will do with a recipe, without doing it: what is read and written, what is done already, how long and how large it gets.

    itm plan -c recipe.yaml
    itm plan -c recipe.yaml train.batch_size=256      # what an override would change
    itm train -c recipe.yaml --dry-run                # the part of one stage

Sizes are counted where shards exist and estimated from the first images where they do not; time is that of a measured second of the
recipe's own training step on this machine. Nothing is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from pipelines.cli import recipe_arguments, recipe_from, script

if TYPE_CHECKING:
    from itm.config import Recipe
    from pipelines.contract import Contract
    from pipelines.estimates import Split


# What a stage writes before the rest of its output; of a store of soft labels the receipt comes last.
_FIRST = {"pack": "pack.json", "features": "features.json", "train": "started.json"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from pipelines.list_recipes import resolved

    print(resolved(args.recipe, args.overrides, args.debug))
    show(recipe_from(args))


def show(recipe: Recipe, only: str | None = None) -> None:
    """Print the plan of all stages of a recipe, or of one. Raises ValueError for what could not run."""
    for line in lines_of(recipe, only):
        print(line, flush=True)


def lines_of(recipe: Recipe, only: str | None = None) -> Iterator[str]:
    """One paragraph a stage, then the sums."""
    from pipelines.contract import stages_of

    yield f"\nrecipe {recipe.name}, fingerprint {recipe.fingerprint()}"
    chosen = [contract for contract in stages_of(recipe) if only in (None, contract.stage)]
    if not chosen:
        yield f"this recipe does not ask for {only}: nothing would be done"
    costs = Costs(recipe)
    for contract in chosen:
        yield f"\n{contract.stage}"
        yield f"  reads   {', '.join(contract.reads(recipe)) or 'nothing: its data are generated'}"
        yield f"  writes  {', '.join(contract.writes(recipe))}"
        state = state_of(contract, recipe)
        yield f"  {state}"
        if state.startswith("done "):
            continue
        yield from (f"  {line}" for line in costs.of(contract.stage))
    if costs.seconds or costs.bytes:
        yield f"\nin all about {_time(costs.seconds)} and {_size(costs.bytes)} on disk, on this machine as busy as it is now"


def _done(contract: Contract, recipe: Recipe) -> str | None:
    """None as well where an input that comes later in time is not there yet."""
    try:
        return contract.done(recipe)
    except ValueError:
        return None


def state_of(contract: Contract, recipe: Recipe) -> str:
    """`done`, or by what lies in the outputs `running` (a driver's lease is alive), `stopped` or `missing`, and what is known of it."""
    from itm.data import files
    from itm.data.lease import holder

    if (done := _done(contract, recipe)) is not None:
        return f"done    {done}"
    places = [recipe.folder] if contract.stage in ("train", "evaluate", "register", "report") else contract.writes(recipe)
    folders = [folder for place in places for folder in (place, *files.list_folders(place))]
    for folder in folders:
        if (who := holder(folder, contract.stage)) is not None:
            return f"running {who}"
    begun = next((folder for folder in folders if _begun(contract.stage, files.sizes(folder))), None)
    return f"stopped {begun} holds a part of it" if begun else "missing"


def _begun(stage: str, names: Collection[str]) -> bool:
    """Whether files of these names are a part of what a stage makes; of a stage that makes one file there are no parts."""
    if stage == "teach":
        return "store.json" not in names and any(name.endswith(".arrow") for name in names)
    return _FIRST.get(stage) in names


class Costs:
    """The costs of the stages that are not done, stage by stage, and their sums."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.seconds, self.bytes = 0.0, 0.0
        self._splits: dict[str, Split] = {}
        self._ray = False

    def of(self, stage: str) -> Iterator[str]:
        """What is to be said about one stage."""
        yield from getattr(self, f"_{stage}")()

    def _split(self, name: str) -> Split:
        from pipelines.estimates import split_of

        if name not in self._splits:
            self._splits[name] = split_of(self.recipe, name)
        return self._splits[name]

    def _trained(self) -> Split:
        """The training split: of a mixture, the sum over its roots."""
        from itm.teachers.stores import roots_of
        from pipelines.estimates import split_of, together

        roots = roots_of(self.recipe)
        return (
            together([split_of(one, one.data.train_split) for one in roots]) if len(roots) > 1 else self._split(roots[0].data.train_split)
        )

    def _add(self, seconds: float, size: float = 0.0, ray: bool = False) -> str:
        from pipelines.estimates import RAY_START

        seconds += RAY_START * (ray and not self._ray)
        self._ray |= ray
        self.seconds, self.bytes = self.seconds + seconds, self.bytes + size
        return f"cost    about {_time(seconds)}" + (f", {_size(size)}" if size else "")

    def _pack(self) -> Iterator[str]:
        from itm.device import cores
        from pipelines.contract import splits_of
        from pipelines.estimates import split_of
        from pipelines.featuring import of_photos

        seconds, size = 0.0, 0.0
        photos = of_photos(self.recipe)
        for name in splits_of(self.recipe):
            split = self._split(name) if photos is self.recipe else split_of(photos, name)
            made = f"{split.images:,} images, {split.captions:,} captions, {split.shards:,} shards, {_size(split.size)}"
            yield f"makes   {name}: about {made}"
            seconds, size = seconds + split.seconds_to_pack / min(cores(), max(1, split.shards)), size + split.size
        yield self._add(seconds, size, ray=True)

    def _features(self) -> Iterator[str]:
        from pipelines.contract import splits_of

        seconds, size = 0.0, 0.0
        for name in splits_of(self.recipe):
            split = self._split(name)
            yield f"makes   {name}: regions of about {split.images:,} images, {split.shards:,} shards, {_size(split.size)}"
            seconds, size = seconds + split.seconds_to_feature, size + split.size
        yield self._add(seconds, size, ray=True)

    def _teach(self) -> Iterator[str]:
        split = self._trained()
        rows = split.images * ("image" in self.recipe.teachers.stored) + split.captions * ("text" in self.recipe.teachers.stored)
        actors = self.recipe.teachers.actors
        by = f"{actors} actors" if actors else "an actor for each GPU, or one"
        yield f"rows    {rows:,} vectors by {by}; how long a teacher takes is not known before it runs"
        yield self._add(0.0, 0.0, ray=True)

    def _train(self) -> Iterator[str]:
        from pipelines.estimates import WORKERS_START, training_of

        recipe = self.recipe
        split = self._trained()
        val = self._split(recipe.data.val_split) if recipe.data.val_split else None
        found = training_of(recipe, split)
        plan, workers = found.course.plan, recipe.train.workers
        passes = f"{plan.steps_per_epoch:,} steps are a pass over {plan.pairs:,} captions"
        yield f"steps   {found.course.steps:,} of {plan.global_batch:,} pairs; {passes}"
        yield f"batch   {found.same_image:.2%} of its pairs are expected to meet another pair of their image"
        yield f"model   {found.weights:,} weights, {found.trained:,} of them trained"
        yield f"memory  about {_size(found.memory)} a worker ({found.device})"
        if online := recipe.teachers.online:
            yield f"online  {' and '.join(online)} teacher run in every step: their time and memory come on top and are not known here"
        yield f"workers {workers or 'none: inside this process'}; a step takes {found.step:.3f} s, decoding for it {found.prepare:.3f} s"
        started = WORKERS_START if workers else 0.0
        yield self._add(found.seconds(recipe, val) + started, found.bytes(recipe, val is not None), ray=bool(workers))
        self._training = found

    def _evaluate(self) -> Iterator[str]:
        split = self._split(self.recipe.data.test_split)
        yield f"rows    {split.images:,} images x {split.captions:,} captions, protocol {self.recipe.evaluation.protocol}"
        found = getattr(self, "_training", None)
        each = (found.look + found.prepare) / self.recipe.train.batch_size if found else 0.0
        yield self._add(2.0 + each * (split.images + split.captions), 2e5)

    def _register(self) -> Iterator[str]:
        from pipelines.estimates import TRACKING

        gate = self.recipe.registry
        yield f"gate    {gate.metric} has to grow by more than {gate.min_gain:g} for the alias champion"
        found = getattr(self, "_training", None)
        yield self._add(TRACKING, 4.0 * found.weights if found else 0.0)

    def _index(self) -> Iterator[str]:
        splits = [self._split(name) for name in self.recipe.index.splits]
        images, captions = sum(split.images for split in splits), sum(split.captions for split in splits)
        yield f"makes   vectors of {images:,} images and {captions:,} captions, as {self.recipe.index.dtype}"

    def _report(self) -> Iterator[str]:
        yield self._add(1.0, 2e5)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


if __name__ == "__main__":
    script(__file__)
