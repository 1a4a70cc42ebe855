"""Every shipped recipe is valid, and its debug twin packs, teaches, trains and evaluates with real stages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from itm.config import Recipe, load_recipe
from pipelines import evaluate, pack, teach, train
from pipelines.cli import RECIPES, stage_main
from pipelines.debug import debug_twin
from pipelines.list_recipes import markdown, resolved
from tests.support import ROOT

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
RECORDED = json.loads((ROOT / "tests" / "fixtures" / "recipes.json").read_text())
ABLATIONS = ("-contrastive", "-csa", "-usa", "-off", "-local", "-global", "-average")
OF_NO_PAPER = ("demo", "clip-finetune", "small-from-scratch")
PARTS: Any = {"data": {"image"}, "teachers": True, "model": True, "method": True}


def shipped(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", list(overrides))


def distinct_twins() -> list[str]:
    """Recipes of one method on two data sets shrink to the same twin: it runs once. Ablations run in tests/system, as shipped."""
    whole = [name for name in NAMES if not name.endswith(ABLATIONS) and not shipped(name).evaluation.ensemble]
    twins = {name: debug_twin(shipped(name)) for name in whole}
    return sorted({json.dumps(twin.model_dump(mode="json", include=PARTS)): name for name, twin in twins.items()}.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_named_as_its_file_and_says_what_it_is(name: str):
    recipe = shipped(name)
    assert recipe.name == name
    assert recipe.about
    assert name.startswith(OF_NO_PAPER) or {"source", "published", "verified", "decisions"} <= set(recipe.paper)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("demo")])
def test_a_published_recipe_registers_under_its_own_name(name: str):
    """Recipes inherit from each other: a run must not take the champion alias of the model that it extends."""
    assert shipped(name).registry.model == name


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_published_recipe_resolves_to_the_values_on_record(name: str):
    """Which file a value is written in is free; what it is belongs to the published figures."""
    assert shipped(name).model_dump(mode="json", exclude_defaults=True) == RECORDED[name]


def test_every_published_recipe_is_on_record():
    assert {name for name in NAMES if shipped(name).paper} == set(RECORDED)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_of_a_paper_trains_in_its_authors_precision_and_any_other_in_the_best_of_the_device(name: str):
    half = name.startswith("iais")  # apex O2, docs/methods/iais.md
    assert shipped(name).train.precision == (("bf16" if half else "fp32") if shipped(name).paper else "auto")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_prints_as_the_yaml_of_its_values(name: str):
    assert yaml.safe_load(resolved(name, ["seed=5"])) == shipped(name, "seed=5").model_dump(mode="json")


def test_a_printed_recipe_says_where_each_value_comes_from(capsys: pytest.CaptureFixture[str]):
    assert stage_main("recipes", ["cusa-sgr-coco", "train.epochs=10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# cusa-sgr-coco.yaml extends cusa-sgr-f30k.yaml extends sgr-f30k.yaml"
    said = {line.split("#")[0].strip(): line.split("# ")[1] for line in lines if "  # " in line}
    assert said["epochs: 10"] == "override"
    assert said["root: data/coco"] == "cusa-sgr-coco.yaml"
    assert said["kind: cusa"] == "cusa-sgr-f30k.yaml"
    assert said["sim_dim: 256"] == "sgr-f30k.yaml"
    assert said["log_every: 10"] == "default"
    assert all("#" in line for line in lines if not line.rstrip().endswith(":"))


def test_a_printed_debug_twin_is_the_one_that_runs():
    assert yaml.safe_load(resolved("sgr-f30k", ["seed=5"], debug=True)) == debug_twin(shipped("sgr-f30k", "seed=5")).model_dump(mode="json")


def test_the_table_of_the_documentation_is_made_from_the_recipes():
    assert markdown() in (RECIPES.parents[1] / "docs" / "recipes.md").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield folder


def run_twin(name: str, place: Path) -> Recipe:
    recipe = debug_twin(shipped(name, f"output={place}"))
    pack.pack(recipe)
    if recipe.teachers.image:
        teach.teach(recipe)
    assert train.train(recipe)["steps"] == 3
    return recipe


@pytest.mark.e2e
@pytest.mark.parametrize("name", distinct_twins())
def test_the_debug_twin_of_every_recipe_runs(name: str, place: Path, ray_local: object):
    if "lora" in shipped(name).model.options:
        pytest.importorskip("peft", reason="the extra lora is not installed")
    result = evaluate.evaluate(run_twin(name, place))
    assert math.isfinite(result["metrics"]["rsum"])


@pytest.mark.parametrize("name", [name for name in NAMES if shipped(name).evaluation.ensemble])
def test_an_ensemble_is_of_shipped_recipes_and_is_not_trained(name: str):
    recipe = shipped(name)
    assert {uri.split("/")[1] for uri in recipe.evaluation.ensemble} <= set(NAMES)
    with pytest.raises(ValueError, match="is an ensemble of .*: train those"):
        train.train(recipe)


@pytest.mark.e2e
def test_the_debug_twin_of_an_ensemble_evaluates_its_members(place: Path, ray_local: object):
    for name in ("sgr-f30k", "saf-f30k"):
        run_twin(name, place)
    result = evaluate.evaluate(debug_twin(shipped("sgraf-f30k", f"output={place}")))
    assert result["score_type"] == "mean of SGR + SAF scores, fp32"
    assert (place / "sgraf-f30k-debug" / "evaluation.json").exists()
