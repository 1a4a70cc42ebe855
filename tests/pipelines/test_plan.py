"""`itm plan`: what a run will do and cost, told without doing it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from itm.config import Recipe, parse_recipe
from itm.data import files
from itm.data.lease import held
from pipelines.cli import stage_main
from pipelines.contract import stages_of
from pipelines.estimates import split_of, training_of
from pipelines.plan import Costs, lines_of, state_of
from pipelines.run import run_stages
from pipelines.train import train
from tests.support.noise_split import small_split
from tests.support.small_training import die_at
from tests.support.small_training import recipe as training

pytest_plugins = ["tests.support.registry_fixtures"]


def tree(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


def scenes(root: Path, **train: object) -> Recipe:
    source = {"kind": "scenes", "options": {"world": "tiny", "n_train": 60, "n_val": 20, "n_test": 20}}
    return training(root, data={"source": source, "shard_samples": 20}, **train)


def test_a_plan_of_data_that_are_not_packed_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = scenes(tmp_path)
    said = "\n".join(lines_of(recipe))
    assert tree(tmp_path) == {}
    assert "train: about 60 images, 300 captions, 3 shards" in said
    assert "10 of 6 pairs; 50 steps are a pass over 300 captions" in said
    for contract in stages_of(recipe):
        assert f"\n{contract.stage}\n" in said


def test_the_bytes_of_shards_are_known_before_they_are_packed(tmp_path: Path) -> None:
    from itm.data.shards import write_shard
    from itm.data.sources.scenes import Scenes

    recipe = scenes(tmp_path)
    records = list(Scenes("tiny", n_train=60).records("train"))
    made = sum(write_shard(str(tmp_path / f"{n}.tar"), records[20 * n : 20 * n + 20]).bytes for n in range(3))
    assert abs(split_of(recipe, "train").size - made) < 0.1 * made


@pytest.mark.e2e
@pytest.mark.parametrize("given", [{"steps": 150}, {"steps": 40, "batch_size": 16}, {"steps": 60, "ema": 0.9, "validate_every": 60}])
def test_the_bytes_of_a_run_are_near_those_that_were_planned(given: dict[str, object], registry: Path, tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        small_split(tmp_path / "shards", name, shards=1, samples=24)
    choices = training(tmp_path, **given).model_dump(mode="json") | {"registry": {"metric": "t2i_r1"}}
    choices["model"]["options"]["image"]["hidden"] = 2048
    recipe = parse_recipe(choices)
    found = training_of(recipe, split_of(recipe, "train"))
    seconds, size = found.seconds(recipe, split_of(recipe, "val")), found.bytes(recipe, validated=True)
    start = time.perf_counter()
    run_stages(recipe)
    took = time.perf_counter() - start
    folder = Path(recipe.folder)
    written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.suffix not in (".html", ".json"))
    assert abs(written - size) < 0.1 * written
    print(f"estimated {seconds:.1f} s, all stages took {took:.1f} s")
    assert Costs(recipe).seconds == 0


def test_what_is_done_is_not_counted_again(registry: Path, tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        small_split(tmp_path / "shards", name, shards=1)
    recipe = parse_recipe(training(tmp_path, steps=2).model_dump(mode="json") | {"registry": {"metric": "t2i_r1"}})
    assert "cost" in "".join(lines_of(recipe))
    run_stages(recipe)
    before = tree(tmp_path)
    said = "".join(lines_of(recipe))
    assert "cost" not in said
    assert said.count("  done    ") == 4
    assert tree(tmp_path) == before


def states(recipe: Recipe) -> dict[str, str]:
    """stage -> done, running, stopped or missing."""
    return {contract.stage: state_of(contract, recipe).split()[0] for contract in stages_of(recipe)}


def test_each_stage_is_done_running_stopped_or_missing_by_what_lies_there(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train", "val", "test"):
        small_split(tmp_path / "shards", name, shards=1)
    recipe = training(tmp_path, steps=4)
    assert states(recipe) == dict.fromkeys(("train", "evaluate", "register", "report"), "missing")
    with held(recipe.folder, "train"):
        assert states(recipe)["train"] == "running"
        assert states(recipe)["evaluate"] == "missing"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(3, patch)
        train(recipe)
    assert states(recipe)["train"] == "stopped"
    train(recipe)
    assert states(recipe)["train"] == "done"
    made = scenes(tmp_path / "made")
    assert states(made)["pack"] == "missing"
    with held(f"{made.data.root}/val", "pack"):
        assert states(made)["pack"] == "running"
    files.write_atomic(f"{made.data.root}/val/pack.json", b"{}")
    assert states(made)["pack"] == "stopped"


def test_a_dry_run_of_a_stage_tells_its_part_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(scenes(tmp_path).model_dump_json())
    for stage, told in (("pack", "makes   train"), ("train", "steps   10 of 6 pairs"), ("teach", "does not ask for teach")):
        assert stage_main(stage, ["-c", str(file), "--dry-run"]) == 0
        assert told in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["r.yaml"]


def test_a_mixture_is_read_from_each_of_its_roots_and_taught_beside_each() -> None:
    data = {"root": "own", "mix": [{"root": "a"}, {"root": "b", "weight": 2}]}
    mixed = parse_recipe({"name": "t", "data": data, "model": {"kind": "dual"}, "teachers": {"text": {"kind": "scenes_text"}}})
    of = {contract.stage: contract for contract in stages_of(mixed)}
    assert of["teach"].reads(mixed) == ["a/train", "b/train"]
    assert [uri.removeprefix(os.getcwd()) for uri in of["teach"].writes(mixed)] == ["/a/train/teachers", "/b/train/teachers"]
    assert of["train"].reads(mixed)[:3] == ["a/train", "b/train", "own/val"]


def test_a_mixture_costs_what_its_roots_cost_together(tmp_path: Path) -> None:
    for root, shards in (("a", 1), ("b", 2)):
        small_split(tmp_path / root, "train", shards=shards)
    for name in ("val", "test"):
        small_split(tmp_path / "own", name, shards=1)
    given = training(tmp_path, steps=2, workers=0).model_dump(mode="json")
    given["data"] |= {"root": str(tmp_path / "own"), "mix": [{"root": str(tmp_path / "a")}, {"root": str(tmp_path / "b"), "weight": 2}]}
    mixed = parse_recipe(given)
    parts = [split_of(parse_recipe({**given, "data": {**given["data"], "root": str(tmp_path / n), "mix": []}}), "train") for n in "ab"]
    captions = sum(part.captions for part in parts)
    assert f"are a pass over {captions} captions" in "\n".join(lines_of(mixed))
