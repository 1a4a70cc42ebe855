"""`itm models`: what the registry holds, told from its tags and its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import itm
from itm.config import Recipe, parse_recipe
from itm.data.shards import read_manifest
from itm.matchers.weights import weights_hash
from itm.tracking.registry import find_version
from itm.tracking.runs import RECIPE, Tracker, client
from pipelines.cli import stage_main
from pipelines.register import register
from tests.support.noise_split import small_split
from tests.support.ports import free_ports
from tests.support.registry_world import matcher_folder

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e


def registered(root: Path, name: str, seed: int, rsum: float, lr: float, manifest: str = "a1", teacher: str = "minilm-1") -> Recipe:
    """A run as training and evaluation leave it, in the registry."""
    choices = {"name": name, "output": str(root), "model": {"kind": "dual"}, "train": {"lr": lr}, "about": f"About {name}."}
    recipe = parse_recipe(choices | {"registry": {"model": "tiny", "licence": "CC-BY-4.0"}})
    folder = Path(recipe.folder)
    matcher_folder(folder / "matcher", seed)
    with Tracker.start("tests", name, recipe.flat()) as tracker:
        tracker.text(json.dumps(recipe.model_dump(mode="json")), RECIPE)  # JSON is YAML
    trained = {"run_id": tracker.run_id, "name": name, "manifest": manifest, "teachers": {"text": teacher}, "git_commit": "beef"}
    (folder / "run.json").write_text(json.dumps(trained | {"recipe_fingerprint": recipe.fingerprint(), "tracking_uri": tracker.uri}))
    measured = {"metrics": {"rsum": rsum, "t2i_r1": rsum / 6}, "chance": {"rsum": 8.5, "t2i_r1": 1.25}}
    about = {
        "split_hash": "t1",
        "split": "test",
        "protocol_name": "auto",
        "matcher_hash": weights_hash(itm.load_matcher(folder / "matcher")),
    }
    (folder / "evaluation.json").write_text(json.dumps(measured | about))
    register(recipe)
    return recipe


@pytest.fixture
def two(registry: Path, tmp_path: Path) -> list[Recipe]:
    """Version 1 of rsum 100, version 2, the champion, of rsum 120 and a higher learning rate."""
    return [registered(tmp_path, "one", 1, 100.0, 1e-3), registered(tmp_path, "two", 2, 120.0, 2e-3, "b2", "minilm-2")]


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert stage_main("models", list(argv)) == 0
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    return json.loads(said(capsys, *argv, "--json"))


def test_versions_are_listed_with_aliases_figures_beside_chance_data_teachers_and_code(two, capsys):
    for words in ([], ["tiny"], ["models:/tiny"]):
        text = said(capsys, *words)
        assert text.index("tiny 2  candidate, champion") < text.index("tiny 1  previous")
        assert "rsum 120.00 (chance 8.50), t2i_r1 20.00 (chance 1.25)" in text
        assert "trained on b2, tested on test t1, protocol auto" in text
        assert "teachers minilm-2, code beef" in text
    newest, oldest = told(capsys, "tiny")
    assert (newest["version"], newest["aliases"], newest["metrics"]["rsum"], newest["chance"]) == (
        2,
        ["candidate", "champion"],
        120.0,
        {"rsum": 8.5, "t2i_r1": 1.25},
    )
    assert (oldest["data"]["train"], oldest["teachers"], oldest["licence"]) == ("a1", ["minilm-1"], "CC-BY-4.0")


def test_the_recipe_of_a_version_is_that_of_its_training_also_where_only_its_params_were_kept(two, capsys):
    assert told(capsys, "show", "tiny@champion", "--recipe")["train"]["lr"] == 2e-3
    assert "lr: 0.001" in said(capsys, "show", "tiny/1", "--recipe")
    assert "licence CC-BY-4.0" in said(capsys, "show", "tiny")
    run_id = find_version("models:/tiny/1").run_id
    artifact = next(Path(client().get_run(run_id).info.artifact_uri.removeprefix("file://")).glob(RECIPE))
    artifact.unlink()  # as runs of version 0.1.0 were
    kept = told(capsys, "show", "tiny/1", "--recipe")
    assert (kept["train"]["lr"], kept["train"]["steps"], kept["model"]["kind"], kept["data"]["flip"]) == (1e-3, None, "dual", False)


def test_two_versions_differ_in_recipe_data_and_metrics(two, capsys):
    found = told(capsys, "diff", "tiny/1", "tiny@champion")
    assert found["recipe"] == {"about": ["About one.", "About two."], "name": ["one", "two"], "train.lr": [1e-3, 2e-3]}
    assert found["data"] == {"train": ["a1", "b2"], "teachers": ["minilm-1", "minilm-2"]}
    assert found["metrics"]["rsum"] == [100.0, 120.0, 8.5]
    text = said(capsys, "diff", "tiny/1", "tiny")
    assert "train.lr: 0.001 -> 0.002" in text
    assert "100.00 ->     120.00        +20  chance 8.50" in text


def test_a_rollback_and_a_promotion_move_the_champion_and_keep_the_one_before(two, capsys):
    assert "version 1 of tiny is champion, version 2 is previous" in said(capsys, "rollback", "tiny")
    assert str(find_version("models:/tiny@champion").version) == "1"
    assert "version 2 of tiny is champion, version 1 is previous" in said(capsys, "rollback", "tiny")
    assert "version 1 of tiny is champion" in said(capsys, "promote", "tiny/1")
    assert str(find_version("models:/tiny@previous").version) == "2"
    assert "is champion already" in said(capsys, "promote", "tiny/1")


def test_models_are_found_by_the_data_and_the_teacher_they_came_from(two, capsys, tmp_path: Path):
    assert [row["version"] for row in told(capsys, "--data", "a1")] == [1]
    assert [row["version"] for row in told(capsys, "--data", "t1")] == [2, 1]
    assert [row["version"] for row in told(capsys, "--teacher", "shards/train/teachers/minilm-2/")] == [2]
    assert "no version" in said(capsys, "--teacher", "minilm")
    small_split(tmp_path / "shards", "train", shards=1)
    fingerprint = read_manifest(str(tmp_path / "shards" / "train")).fingerprint()
    registered(tmp_path, "three", 3, 90.0, 1e-3, fingerprint)
    for folder in (tmp_path / "shards" / "train", tmp_path / "shards"):
        assert [row["version"] for row in told(capsys, "--data", str(folder))] == [3]
    (tmp_path / "empty").mkdir()
    assert stage_main("models", ["--data", str(tmp_path / "empty")]) == 2


def test_what_is_not_there_is_told_with_what_is(two, capsys):
    for argv, message in {
        ("tinny",): "did you mean 'tiny'",
        ("show", "tiny@best"): "it has candidate (version 2), champion (version 2), previous (version 1)",
        ("diff", "tiny"): "itm models diff takes 2 names",
        ("tiny", "tiny"): "one model at a time",
        ("--runs", "nothing"): "no experiment 'nothing'",
    }.items():
        assert stage_main("models", list(argv)) == 2
        assert message in capsys.readouterr().err


def test_runs_are_listed_and_those_of_a_dead_driver_are_told_apart_and_ended(two, capsys):
    with Tracker.start("tests", "killed") as tracker:
        pass
    door = client()
    door.set_tag(tracker.run_id, "driver", door.get_run(tracker.run_id).data.tags["driver"].rpartition(" ")[0] + " 1")  # started long ago
    door.update_run(tracker.run_id, status="RUNNING")
    rows = {row["name"]: row["status"] for row in told(capsys, "--runs", "tests")}
    assert rows == {"killed": "DEAD", "two": "FINISHED", "one": "FINISHED"}
    assert door.get_run(tracker.run_id).info.status == "KILLED"
    assert "DEAD" in said(capsys, "--runs", "tests")


def test_the_version_and_its_run_carry_a_model_card_and_the_package_as_well(two):
    version = find_version("models:/tiny@champion")
    card = version.description
    for part in (
        "# two",
        "About two.",
        "Training data: data/shards/train b2",
        "minilm-2",
        "CC-BY-4.0",
        "| rsum | 120 | 8.5 |",
        "## Limits",
    ):
        assert part in card, part
    assert client().get_run(version.run_id).data.tags["mlflow.note.content"] == card
    package = Path(client().get_logged_model(version.source.removeprefix("models:/")).artifact_location.removeprefix("file://"))
    assert (package / "README.md").read_text().startswith("---\nlicense: CC-BY-4.0\n")
    assert "lr: 0.002" in (package / RECIPE).read_text()
    assert client().get_run(version.run_id).data.metrics == {"test/auto/rsum": 120.0, "test/auto/t2i_r1": 20.0}


def test_a_dead_server_is_told_at_once(monkeypatch: pytest.MonkeyPatch, capsys):
    [port] = free_ports(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    assert stage_main("models", []) == 2
    assert f"no answer from the tracking server at http://127.0.0.1:{port}" in capsys.readouterr().err
