"""What a run's folder says of an earlier training, and whether this one is the same, goes on with it, or is another."""

from __future__ import annotations

from typing import Any

from itm.config import NO_CHOICES, Recipe, parse_recipe
from itm.data import files
from itm.data.formats import Json
from itm.data.manifest import Manifest
from itm.data.mix import Mixture
from itm.training.checkpoint import latest

LENGTH = ("train.steps", "train.epochs", "train.patience", "train.max_hours")
# Read when the training is over: another value is no other training.
LATER = ("registry.", "evaluation.", "data.test_split", "data.source.", "data.shard_samples", "train.log_every")
MISSING = "nothing"


def differences(recorded: Json, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value of the earlier run, value now), of the choices that are not the same."""
    before, now = (_flat(parse_recipe(recorded, where="an earlier run"))), _flat(recipe)
    keys = [key for key in {**before, **now} if before.get(key, MISSING) != now.get(key, MISSING)]
    return {key: (before.get(key, MISSING), now.get(key, MISSING)) for key in keys}


def _flat(recipe: Recipe) -> dict[str, Any]:
    """The choices of a recipe by dotted key: what `fingerprint` counts."""
    flat = recipe.flat()
    left_out = {name for name, said in NO_CHOICES.items() if said is True}
    left_out |= {f"{section}.{name}" for section, names in NO_CHOICES.items() if names is not True for name in names}
    return {key: value for key, value in flat.items() if key not in left_out and key.partition(".")[0] not in left_out}


def recorded_in(*earlier: Json | None) -> Json | None:
    """The recipe that run.json or started.json recorded; None where neither did."""
    return next((said["recipe"] for said in earlier if said and "recipe" in said), None)


def check_same(folder: str, earlier: tuple[Json | None, ...], recipe: Recipe, located: Recipe, manifest: Manifest | Mixture) -> bool:
    """Whether the run in the folder is this one but for its length. earlier: run.json, started.json (None: not there);
    located: the recipe with absolute paths, as they record it.

    Raises ValueError, naming each key with both values, when it is of other choices or of other data.
    """
    recorded = recorded_in(*earlier)
    known = {recipe.fingerprint(), recipe.whole_fingerprint(recorded) if recorded else None}
    remedy = "give the run another name=, or --overwrite to start afresh"
    longer = False
    for said in filter(None, earlier):
        if said["manifest"] != manifest.fingerprint():
            raise ValueError(
                f"{folder} holds a run on other shards: its training split had the manifest {said['manifest']}, "
                f"{'data.mix' if recipe.data.mix else 'data.root'} has {manifest.fingerprint()} now; {remedy}"
            )
        if said["recipe_fingerprint"] in known:
            continue
        if recorded is None:
            two = f"{said['recipe_fingerprint']}, this one has {recipe.fingerprint()}"
            raise ValueError(f"{folder} holds a run with recipe_fingerprint {two}; {remedy}")
        found = differences(recorded, located)
        others = {key: values for key, values in found.items() if key not in LENGTH and not key.startswith(LATER)}
        if others:
            shown = "; ".join(f"{key} was {_shown(before)}, is {_shown(now)}" for key, (before, now) in others.items())
            raise ValueError(f"{folder} holds a run with other choices: {shown}; {remedy}")
        longer |= not found or any(key in LENGTH for key in found)  # not found: started.json tells of the new length already
    return longer


def begun(folder: str) -> bool:
    """Whether a checkpoint was written: of a run that failed before, nothing is worth keeping."""
    return latest(files.join(folder, "checkpoints")) is not None


def _shown(value: Any) -> str:
    return MISSING if value is None else str(value)
