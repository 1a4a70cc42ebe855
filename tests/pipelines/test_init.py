"""`itm init`: says what it found and writes a recipe that works as it is; asks where two readings are possible."""

from __future__ import annotations

from pathlib import Path

import pytest

from itm.config import load_recipe
from itm.packaged import have_real
from pipelines.cli import stage_main
from pipelines.contract import splits_of, stages_of
from pipelines.estimates import split_of, training_of
from pipelines.featuring import encoder_of
from pipelines.init import init
from tests.support.hub_models import SIDE, tiny
from tests.support.own_photos import scenes, table, walk_world, write_photos
from tests.support.raw_layouts import LAYOUTS


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.estimates.MEASURED", 0.0)  # one step of each is enough here


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_a_recipe_whose_first_step_can_be_taken(name: str, tmp_path: Path) -> None:
    said = init([str(LAYOUTS[name](tmp_path))], "recipe.yaml", {})
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert said[-1].startswith("next ")
    assert {recipe.data.train_split, recipe.data.test_split} <= set(splits_of(recipe))
    if name in ("bare_photos", "tar_of_photos"):
        assert "itm pack -c recipe.yaml" in said[-1]
        assert not split_of(recipe, "train").captions
    else:
        assert "itm run -c recipe.yaml" in said[-1]
        found = training_of(recipe, split_of(recipe, recipe.data.train_split))
        assert found.course.steps == recipe.train.steps


def test_photos_and_a_table_are_told_with_counts_and_every_problem(tmp_path: Path) -> None:
    walk_world(tmp_path)
    said = "\n".join(init(["."], "recipe.yaml", {}))
    assert "captions  285 of 57 images looked at; an image least / mean / most: 5 / 5.00 / 5" in said
    assert "sizes     64-64 x 64-64 pixels" in said
    assert said.count("example ") == 5
    assert "3 x sample photo" in said and "cannot be read: No such file or directory" in said
    assert "line" in said and "captions.csv is taken as a character of the caption" in said
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.source is not None
    assert recipe.data.source.options["split"] == {"test": 0.1}
    assert recipe.data.max_reject_rate > 4 / 61
    assert "/" + str(tmp_path) not in (tmp_path / "recipe.yaml").read_text()


def test_many_photos_are_validated_as_well(tmp_path: Path) -> None:
    records = scenes(220, "tiny")
    (tmp_path / "said.csv").write_text(table(write_photos(tmp_path / "photos", records), records))
    init(["."], "recipe.yaml", {})
    data = load_recipe(tmp_path / "recipe.yaml").data
    assert (data.train_split, data.val_split, data.test_split) == ("train", "val", "test")


def test_where_nobody_can_be_asked_the_flag_is_named_and_with_a_person_the_question_is_put(tmp_path: Path, capsys) -> None:
    folder = LAYOUTS["csv_with_header"](tmp_path)
    (folder / "other.csv").write_text((folder / "captions.csv").read_text())
    assert stage_main("init", [str(folder)]) == 2
    assert f"--annotations {folder}/other.csv" in capsys.readouterr().err
    assert not (tmp_path / "recipe.yaml").exists()
    asked = []

    def person(question) -> str:
        asked.append(question.flag)
        return next(iter(question.answers))

    init([str(folder)], "recipe.yaml", {}, ask=person)
    assert asked == ["annotations"]
    assert stage_main("init", [str(folder), "--annotations", f"{folder}/other.csv", "-o", "other.yaml"]) == 0


def test_a_recipe_that_is_there_is_not_replaced_unasked(tmp_path: Path, capsys) -> None:
    folder = LAYOUTS["csv_with_header"](tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    assert stage_main("init", [str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "recipe.yaml").read_text() == "name: mine\n"
    assert stage_main("init", [str(folder), "--overwrite"]) == 0


def test_a_pretrained_model_is_fine_tuned_at_its_own_sizes(tmp_path: Path) -> None:
    folder = LAYOUTS["csv_with_header"](tmp_path)
    tiny(tmp_path / "clip", "clip")
    init([str(folder)], "recipe.yaml", {}, model="./clip")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.model.kind, recipe.data.image_size, recipe.text.kind) == ("hf_dual", SIDE, "hf")
    assert training_of(recipe, split_of(recipe, "train")).trained > 0


@pytest.mark.skipif(not have_real(), reason="the optional extra itm[real] is not installed")
def test_the_towers_of_the_extra_real_are_proposed_and_taken_where_asked_for(tmp_path: Path) -> None:
    folder = LAYOUTS["csv_with_header"](tmp_path)
    assert any(line.startswith("better    --model real") for line in init([str(folder)], "small.yaml", {}))
    said = init([str(folder)], "recipe.yaml", {}, model="real")
    assert not any(line.startswith("better") for line in said)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert [contract.stage for contract in stages_of(recipe)][:3] == ["pack", "features", "train"]
    assert (recipe.data.cache_features, recipe.data.image_size) == (True, 224)
    assert encoder_of(recipe).kind == "efficientnet_lite0"
    assert recipe.features.photos != recipe.data.root


def test_field_case_07_punctuation_only_captions_are_told_and_the_recipe_trains_as_it_is(tmp_path: Path) -> None:
    from pipelines.survey import survey

    records = scenes(8, "tiny")
    names = write_photos(tmp_path / "photos", records)
    rows = [(name, record.captions[0].text) for name, record in zip(names, records, strict=True)]
    rows[5] = (names[5], "...")
    (tmp_path / "said.csv").write_text("".join(f"{name},{text}\n" for name, text in [("image", "caption"), *rows]))
    said = "\n".join(init(["."], "recipe.yaml", {}))
    assert "problems  1" in said
    assert "caption '...' holds no word" in said
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.max_reject_rate > 1 / 8
    assert survey(_found(["."])).lost.total() == 0  # its image is packed, with the caption; training leaves the pair out


def _found(paths: list[str]):
    from itm.data.detect.look import look

    return look(paths, {})


def test_inspect_of_a_recipe_tells_what_later_stages_turn_lay_over_white_or_leave_out(tmp_path: Path, capsys) -> None:
    from PIL import Image

    (tmp_path / "photos").mkdir()
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "photos/a.jpg", exif=turn)
    Image.new("RGBA", (8, 6)).save(tmp_path / "photos/b.png")
    (tmp_path / "said.csv").write_text("image,caption\na.jpg,a dog\nb.png,!!\n")
    init(["."], "recipe.yaml", {})
    assert stage_main("inspect", ["-c", "recipe.yaml"]) == 1
    said = capsys.readouterr().out
    assert "turned    1 " in said
    assert "clear     1 " in said
    assert "'!!' holds no word" in said


def test_inspect_of_a_recipe_without_a_source_looks_at_its_shards(tmp_path: Path, capsys) -> None:
    init([str(LAYOUTS["img2dataset"](tmp_path))], "recipe.yaml", {})
    assert stage_main("inspect", ["-c", "recipe.yaml"]) == 0
    assert "img2dataset (image, .txt, .json)" in capsys.readouterr().out
