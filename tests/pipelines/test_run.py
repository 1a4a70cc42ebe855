"""`itm run`: every stage that a recipe asks for, in order, once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from itm.config import Recipe, parse_recipe
from itm.data import files
from itm.sections import Indexed
from pipelines.contract import CONTRACTS, stages_of
from pipelines.run import run_stages
from tests.support.noise_split import small_split
from tests.support.small_training import recipe as training

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e


def small(root: Path, **given: object) -> Recipe:
    choices = training(root, steps=2, validate_every=2, checkpoint_every=2).model_dump(mode="json")
    return parse_recipe(choices | {"registry": {"model": "ran", "metric": "t2i_r1"}} | given)


@pytest.fixture
def recipe(registry: Path, tmp_path: Path) -> Recipe:
    for name in ("train", "val", "test"):
        small_split(tmp_path / "shards", name, shards=1)
    return small(tmp_path)


def stamps(folder: str) -> dict[str, float]:
    return {str(path): os.stat(path).st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def test_the_stages_run_in_order_and_a_second_call_writes_nothing(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stages(recipe) == ["train", "evaluate", "register", "report"]
    written = stamps(recipe.folder)
    for contract in stages_of(recipe):
        assert all(files.exists(uri) for uri in contract.manifest(recipe)), contract.stage
    capsys.readouterr()
    assert run_stages(recipe) == []
    said = capsys.readouterr().out
    assert [line.split(" done already")[0].strip() for line in said.splitlines()] == ["train", "evaluate", "register", "report"]
    assert "chance" in said
    assert stamps(recipe.folder) == written


def test_what_follows_a_changed_output_is_done_again(recipe: Recipe, tmp_path: Path) -> None:
    run_stages(recipe)
    Path(recipe.folder, "report.html").unlink()
    assert run_stages(recipe) == ["report"]
    small_split(tmp_path / "shards", "test", shards=2)
    assert run_stages(recipe) == ["evaluate", "register", "report"]


def test_a_stage_that_fails_is_named_with_its_reason_and_the_way_to_go_on(recipe: Recipe, tmp_path: Path) -> None:
    for path in (tmp_path / "shards" / "test").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"evaluate failed: .*test") as failed:
        run_stages(recipe, again="itm run -c mine.yaml")
    assert "train is done and kept; mend that and call `itm run -c mine.yaml` again: it goes on at evaluate" in str(failed.value)
    small_split(tmp_path / "shards", "test", shards=1)
    assert run_stages(recipe) == ["evaluate", "register", "report"]


def test_a_recipe_asks_only_for_the_stages_that_it_can_do(tmp_path: Path) -> None:
    every = [contract.stage for contract in CONTRACTS]
    source, teacher = {"kind": "scenes", "options": {"world": "tiny"}}, {"kind": "scenes_image", "options": {"world": "tiny"}}
    whole = small(tmp_path, data={"source": source}, teachers={"image": teacher})
    assert [c.stage for c in stages_of(whole)] == ["pack", "teach", "train", "evaluate", "register", "report"]
    with_features = small(tmp_path, data={"source": source}, teachers={"image": teacher}, features={"photos": str(tmp_path / "photos")})
    assert [c.stage for c in stages_of(with_features)] == ["pack", "features", *(c.stage for c in stages_of(whole)[1:])]
    all_of_it = with_features.model_copy(update={"index": Indexed(splits=["test"])})
    assert [c.stage for c in stages_of(all_of_it)] == every
    assert set(every) == {"index", *(c.stage for c in stages_of(with_features))}
    assert [c.stage for c in stages_of(small(tmp_path))] == ["train", "evaluate", "register", "report"]
    ensemble = small(tmp_path, evaluation={"ensemble": ["a/matcher", "b/matcher"]})
    assert [c.stage for c in stages_of(ensemble)] == ["evaluate", "register", "report"]
