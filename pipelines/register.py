"""Put a run's matcher into the model registry; promote it to `champion` if the gate metric improved.

    itm register -c demo.yaml                                   # the run of this recipe
    itm register -c demo.yaml --run runs/demo/demo-cusa         # another run's folder, same gate
    itm register -c demo.yaml registry.metric=t2i_map_at_r registry.min_gain=0.005

Reads matcher/, evaluation.json and run.json of the run, so train and evaluate come first. Of an ensemble recipe the mean of its members
is registered as one matcher, with their weights inside; evaluate comes first. The version carries its metrics and its lineage as tags
(weights, training and test manifests, teachers, recipe, git commit), and what else was measured on these weights as a tag for each
protocol, e.g. metrics/test/eccv. Running it again adds no version; after another evaluation it adds that one's tag.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

import itm
from itm.arguments import read_from
from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json, read_json
from pipelines.cli import recipe_arguments, recipe_from, script
from pipelines.evaluating import FORMAT, group_of
from pipelines.evaluating.measured import figures_of, measured
from pipelines.training import FORMAT as RUN_FORMAT

if TYPE_CHECKING:
    from itm.tracking.card import Card

RECEIPT, RECEIPT_FORMAT = "registered.json", 1  # in the run's folder: which version this evaluation became
SERVED = Path(itm.__file__).with_name("pyfunc.py")


@dataclass(frozen=True)
class Registered:
    """A version of a model, whether it is the champion now, and why."""

    name: str
    version: str
    champion: bool
    reason: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--run", type=read_from, help="folder or URI of the run (default: <output>/<name> of the recipe)")


def run(args: argparse.Namespace) -> None:
    done = register(recipe_from(args), args.run)
    print(f"{done.uri}: {done.reason}")


def register(recipe: Recipe, run_folder: str | None = None) -> Registered:
    """Register the matcher of a run under `registry.model` and let it through the gate of `registry.metric`.

    Raises ValueError naming the stage to run first or again, or the known metrics when the gate's is not among them.
    """
    from itm.matchers.weights import weights_hash
    from itm.tracking.registry import promote, register_matcher
    from itm.tracking.runs import check_recorded, run_of

    folder = run_folder or recipe.folder
    if recipe.evaluation.ensemble and run_folder is None:
        from pipelines.ensemble import assemble

        assemble(recipe, _read(folder, "evaluation.json", "evaluate", FORMAT))
    trained, evaluated = _read(folder, "run.json", "train", RUN_FORMAT), _read(folder, "evaluation.json", "evaluate", FORMAT)
    if found := run_of(folder):
        check_recorded(*found)
    metrics = {name: float(value) for name, value in evaluated["metrics"].items()}
    gate = recipe.registry
    if gate.metric not in metrics:
        raise ValueError(f"registry.metric={gate.metric} was not measured; {folder}/evaluation.json has {', '.join(sorted(metrics))}")
    finite = _finite(metrics)
    with files.local_copy(files.join(folder, "matcher")) as matcher:
        if evaluated.get("matcher_hash") != weights_hash(itm.load_matcher(matcher, allow=recipe.allowed)):
            raise ValueError(f"{folder}/evaluation.json was measured on other weights than {folder}/matcher; run `itm evaluate` again")
        tags, card = _tags(recipe, trained, evaluated), _card(recipe, folder, trained, evaluated)
        version = register_matcher(matcher, gate.model, trained["run_id"], finite, tags, code=SERVED, card=card)
    gained = promote(gate.model, version, gate.metric, metrics[gate.metric], gate.min_gain, comparable="test_data")
    if run_folder is None:
        said = _receipt_of(recipe) | {"version": version, "champion": bool(gained), "reason": gained.reason}
        files.write_atomic(files.join(folder, RECEIPT), json.dumps(said, indent=1).encode())
    return Registered(gate.model, version, bool(gained), gained.reason)


def receipt(recipe: Recipe) -> Json | None:
    """What `registered.json` of the recipe's run says, if it is of this evaluation, gate and tracking store; else None."""
    uri = files.join(recipe.folder, RECEIPT)
    if not files.exists(uri) or not files.exists(files.join(recipe.folder, "evaluation.json")):
        return None
    said = read_json(uri, RECEIPT_FORMAT)
    return said if all(said.get(key) == value for key, value in _receipt_of(recipe).items()) else None


def _receipt_of(recipe: Recipe) -> Json:
    from itm.tracking.addresses import tracking_uri

    gate, evaluated = recipe.registry, files.read_bytes(files.join(recipe.folder, "evaluation.json"))
    about = {"model": gate.model, "metric": gate.metric, "min_gain": gate.min_gain, "tracking_uri": tracking_uri()}
    others = _others(recipe.folder)
    beside = {"others": hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:12]} if others else {}
    return {"format": RECEIPT_FORMAT, **about, "evaluation": hashlib.sha256(evaluated).hexdigest()[:12], **beside}


def _tags(recipe: Recipe, trained: Json, evaluated: Json) -> Json:
    """What was trained is told by run.json: the recipe at hand may be another when --run is given."""
    return {
        "recipe": trained.get("recipe_fingerprint", recipe.fingerprint()),
        "recipe_name": trained.get("name", recipe.name),
        "train_data": trained.get("manifest"),
        "teachers": ", ".join(sorted(map(str, trained.get("teachers", {}).values()))),
        "git_commit": trained.get("git_commit"),
        "test_data": _test_data(evaluated),
        "licence": recipe.registry.licence,
        "metrics": json.dumps(_finite(evaluated["metrics"])),
        "chance": json.dumps(evaluated.get("chance", {})),
    }


def _test_data(evaluated: Json) -> str:
    return f"{evaluated['split']} {evaluated['split_hash']}, protocol {evaluated['protocol_name']}"


def _card(recipe: Recipe, folder: str, trained: Json, evaluated: Json) -> Card:
    """Of the recipe that the run recorded; of the one at hand where it is the same."""
    from itm.tracking.card import Card

    started = files.join(folder, "started.json")
    chosen = read_json(started, RUN_FORMAT).get("recipe", {}) if files.exists(started) else {}
    if not chosen and trained.get("recipe_fingerprint") == recipe.fingerprint():
        chosen = recipe.model_dump(mode="json")
    data, model, method = (chosen.get(name, {}) for name in ("data", "model", "method"))
    where = files.join(data["root"], data["train_split"]) if data else ""
    if members := trained.get("members"):
        made = f"the mean of the scores of {', '.join(members)}"
    else:
        made = f"{model['kind']}, trained by {method['kind']}" if model and method else ""
    return Card(
        title=trained.get("name", recipe.name),
        group=group_of(evaluated),
        about=chosen.get("about", ""),
        model=made,
        train_data=" ".join(filter(None, (where, trained.get("manifest")))),
        test_data=_test_data(evaluated),
        teachers=", ".join(f"{modality}: {name}" for modality, name in trained.get("teachers", {}).items()),
        code=trained.get("git_commit") or "",
        licence=recipe.registry.licence,
        recipe=yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True),
        others={name: _finite(found) for name, found in _others(folder).items()},
    )


def _others(folder: str) -> dict[str, dict[str, float]]:
    """Name -> figures of what was measured on the run's weights beside evaluation.json."""
    return dict(list(figures_of(measured(folder)).items())[1:])


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _read(folder: str, name: str, stage: str, known: int) -> Json:
    uri = files.join(folder, name)
    if not files.exists(uri):
        raise ValueError(f"no {uri}; run `itm {stage}` with the same recipe first")
    return read_json(uri, known)


if __name__ == "__main__":
    script(__file__)
