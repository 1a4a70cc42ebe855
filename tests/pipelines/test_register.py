from __future__ import annotations

import json
from pathlib import Path

import pytest

import itm
from itm.config import Recipe, parse_recipe
from itm.matchers.weights import weights_hash
from itm.tracking.lookup import version_of
from itm.tracking.registry import find_version
from itm.tracking.runs import Tracker, client
from pipelines.cli import stage_main
from pipelines.register import receipt, register
from tests.support.registry_world import matcher_folder

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e


def finished_run(root: Path, name: str, rsum: float, seed: int, test_data: str = "t1") -> Recipe:
    recipe = parse_recipe({"name": name, "output": str(root), "model": {"kind": "dual"}, "registry": {"model": "tiny", "min_gain": 1.0}})
    folder = Path(recipe.folder)
    matcher_folder(folder / "matcher", seed)
    with Tracker.start("tests", name) as tracker:
        trained = {
            "run_id": tracker.run_id,
            "name": name,
            "recipe_fingerprint": "f" * 12,
            "manifest": "a1",
            "teachers": {"text": "minilm-1"},
        }
    (folder / "run.json").write_text(json.dumps(trained | {"git_commit": "beef"}))
    measured = {"metrics": {"rsum": rsum, "t2i_medr": 3}, "split_hash": test_data, "split": "test", "protocol_name": "auto"}
    (folder / "evaluation.json").write_text(json.dumps(measured | {"matcher_hash": weights_hash(itm.load_matcher(folder / "matcher"))}))
    return recipe


def test_a_better_run_becomes_champion_and_says_where_it_came_from(registry: Path, tmp_path: Path):
    first = register(finished_run(tmp_path, "one", 100.0, 1))
    assert (first.version, first.champion) == ("1", True)
    assert not register(finished_run(tmp_path, "two", 100.5, 2)).champion
    third = register(finished_run(tmp_path, "three", 105.0, 3))
    assert third.champion
    assert "105" in third.reason
    version = find_version("models:/tiny@champion")
    assert str(version.version) == third.version == "3"
    lineage = {
        "recipe": "f" * 12,
        "recipe_name": "three",
        "train_data": "a1",
        "test_data": "test t1, protocol auto",
        "teachers": "minilm-1",
        "git_commit": "beef",
    }
    assert lineage.items() <= version.tags.items()
    assert version.tags["rsum"] == "105.0"


def test_every_protocol_that_measured_the_weights_has_a_tag_and_a_heading_of_its_own(registry: Path, tmp_path: Path):
    recipe = finished_run(tmp_path, "one", 100.0, 1)
    main = json.loads((Path(recipe.folder) / "evaluation.json").read_text())
    found = {"eccv": {"i2t_eccv_r1": 71.5}, "isd": {"isd_L_singular": 0.25}, "coco-1k-5fold": {"rsum": 400.0}}
    for name, metrics in found.items():
        path = Path(recipe.folder) / f"evaluation-{name}.json"
        path.write_text(json.dumps(main | {"protocol_name": name, "metrics": metrics}))
    other = main | {"protocol_name": "t2t", "metrics": {"t2t_r1": 1.0}, "matcher_hash": "of other weights"}
    (Path(recipe.folder) / "evaluation-t2t.json").write_text(json.dumps(other))
    version = find_version(register(recipe).uri)
    said = {tag.removeprefix("metrics/test/"): json.loads(text) for tag, text in version.tags.items() if tag.startswith("metrics/")}
    assert said == found and json.loads(version.tags["metrics"])["rsum"] == version_of("tiny/1").metrics["rsum"] == 100.0
    assert version_of("tiny/1").others == {f"test/{name}": metrics for name, metrics in found.items()}
    assert "## test/eccv" in version.description and "| i2t_eccv_r1 | 71.5 |" in version.description
    known = client().get_run(version.run_id).data.metrics
    assert (known["test/auto/rsum"], known["test/coco-1k-5fold/rsum"], known["test/isd/isd_L_singular"]) == (100.0, 400.0, 0.25)


def test_an_evaluation_after_registering_asks_for_the_stage_again_and_adds_its_tag(registry: Path, tmp_path: Path):
    recipe = finished_run(tmp_path, "one", 100.0, 1)
    register(recipe)
    assert receipt(recipe) is not None
    main = json.loads((Path(recipe.folder) / "evaluation.json").read_text())
    sts = main | {"protocol_name": "sts", "split": "sts", "metrics": {"sts_mean": 58.0}}
    (Path(recipe.folder) / "evaluation-sts.json").write_text(json.dumps(sts))
    assert receipt(recipe) is None
    assert register(recipe).version == "1" and receipt(recipe) is not None
    assert json.loads(find_version("models:/tiny/1").tags["metrics/test/sts"]) == {"sts_mean": 58.0}


def test_registering_a_run_twice_changes_nothing(registry: Path, tmp_path: Path):
    recipe = finished_run(tmp_path, "one", 100.0, 1)
    assert register(recipe).version == register(recipe).version
    with pytest.raises(ValueError, match="no version 2; it has 1"):
        find_version("models:/tiny/2")


def test_another_run_folder_goes_through_the_gate_of_the_recipe(registry: Path, tmp_path: Path):
    recipe = finished_run(tmp_path, "one", 100.0, 1)
    register(recipe)
    other = finished_run(tmp_path, "two", 300.0, 2, test_data="another split")
    kept = register(recipe, run_folder=other.folder)
    assert not kept.champion
    assert "do not compare" in kept.reason


def test_a_run_that_is_not_ready_is_refused_with_the_stage_to_run(registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = finished_run(tmp_path, "one", 100.0, 1)
    with pytest.raises(ValueError, match=r"registry.metric=r9 was not measured; .*has rsum, t2i_medr"):
        register(recipe.model_copy(update={"registry": recipe.registry.model_copy(update={"metric": "r9"})}))
    matcher_folder(Path(recipe.folder) / "matcher", seed=9)
    with pytest.raises(ValueError, match="measured on other weights"):
        register(recipe)
    (Path(recipe.folder) / "evaluation.json").unlink()
    (tmp_path / "r.yaml").write_text(f"name: one\noutput: {tmp_path}\nmodel: {{kind: dual}}\n")
    assert stage_main("register", ["-c", str(tmp_path / "r.yaml")]) == 2
    assert "run `itm evaluate` with the same recipe first" in capsys.readouterr().err
