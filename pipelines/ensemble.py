"""The mean of the members of an ensemble recipe, as a training would have left it: <run>/matcher and run.json, with an MLflow run."""

from __future__ import annotations

import json
from collections.abc import Sequence

import yaml

import itm
from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json, read_json
from itm.environment import environment
from itm.matchers.folder import save_matcher
from itm.matchers.mean import Mean
from itm.matchers.weights import weights_hash
from pipelines.evaluating.result import track
from pipelines.training import FORMAT


def assemble(recipe: Recipe, evaluated: Json) -> Json:
    """Write the mean of `evaluation.ensemble`, as it was evaluated, unless it is there; returns what run.json says.

    Raises ValueError for members that make no ensemble, and for other weights than those that were evaluated.
    """
    from itm.tracking.addresses import tracking_uri

    uris = recipe.evaluation.ensemble
    mean = Mean.of([itm.load_matcher(uri, allow=recipe.allowed) for uri in uris], uris)
    if evaluated.get("matcher_hash") != (found := weights_hash(mean)):
        raise ValueError(f"{recipe.folder}/evaluation.json was measured on other weights than {' + '.join(uris)}; run `itm evaluate` again")
    receipt = files.join(recipe.folder, "run.json")
    if files.exists(receipt):
        kept = read_json(receipt, FORMAT)
        if (kept.get("matcher_hash"), kept.get("tracking_uri")) == (found, tracking_uri()):
            return kept
        files.delete(receipt)
    save_matcher(mean, files.join(recipe.folder, "matcher"))
    done = _recorded(recipe, uris, found)
    files.write_atomic(receipt, json.dumps(done, indent=1).encode())
    track(recipe, evaluated, files.join(recipe.folder, "evaluation.json"))
    return done


def _recorded(recipe: Recipe, uris: Sequence[str], matcher_hash: str) -> Json:
    """An MLflow run of the ensemble, and what is known of the training of its members."""
    from itm.tracking.lineage import git_commit
    from itm.tracking.runs import RECIPE, Tracker

    trained = [_trained(uri) for uri in uris]
    manifests = list(dict.fromkeys(str(said["manifest"]) for said in trained if said.get("manifest")))
    teachers = {modality: name for said in trained for modality, name in said.get("teachers", {}).items()}
    about = {"recipe_fingerprint": recipe.fingerprint(), "manifest": " + ".join(manifests), "teachers": teachers}
    members = {"members": list(uris), "matcher_hash": matcher_hash}
    tags = {"stage": "ensemble", **about, "members": ", ".join(uris)}
    with Tracker.start(recipe.registry.experiment, recipe.name, recipe.flat(), tags) as tracker:
        tracker.text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), RECIPE)
    done = {"format": FORMAT, "run_id": tracker.run_id, "tracking_uri": tracker.uri, "name": recipe.name, **about, **members}
    return done | {"git_commit": git_commit(), "environment": environment(), "matcher": files.join(recipe.folder, "matcher")}


def _trained(uri: str) -> Json:
    """What is known of the training of a member: its run.json, or the tags of its version; {} of one that was made elsewhere."""
    if uri.startswith("models:/"):
        from itm.tracking.registry import find_version

        tags = find_version(uri).tags
        return {"manifest": tags.get("train_data")}
    receipt = files.join(uri.rstrip("/").rpartition("/")[0], "run.json")
    return read_json(receipt, FORMAT) if not uri.startswith("runs:/") and files.exists(receipt) else {}
