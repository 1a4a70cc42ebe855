"""The recipe refuses what it does not know, names the near key, and fingerprints choices only."""

from __future__ import annotations

import pytest

from itm.config import load_recipe, parse_recipe
from itm.kinds import Kinds, build_part

MINIMAL = {"name": "x", "model": {"kind": "dual"}}


def test_an_unknown_key_names_the_near_one():
    with pytest.raises(ValueError, match=r"unknown key 'train\.batchsize'; did you mean 'batch_size'"):
        parse_recipe({**MINIMAL, "train": {"batchsize": 3}})


def test_every_problem_is_reported_at_once():
    with pytest.raises(ValueError, match="train.lr") as error:
        parse_recipe({**MINIMAL, "train": {"lr": -1}, "dta": {}})
    assert "did you mean 'data'" in str(error.value)


def test_overrides_are_yaml_and_reach_nested_options(tmp_path):
    (tmp_path / "r.yaml").write_text("name: x\nmodel: {kind: dual, options: {width: 8}}\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["train.steps=5", "model.options.width=16", "data.flip=true"])
    assert (recipe.train.steps, recipe.model.options["width"], recipe.data.flip) == (5, 16, True)


def test_extending_a_recipe_merges_sections_and_replaces_a_part_of_another_kind(tmp_path):
    (tmp_path / "base.yaml").write_text("name: base\nmodel: {kind: dual, options: {width: 8}}\ntrain: {lr: 0.1, steps: 3}\n")
    (tmp_path / "r.yaml").write_text("extends: base.yaml\nname: x\nmodel: {kind: scan}\ntrain: {steps: 4}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.model.options == {}
    assert (recipe.train.lr, recipe.train.steps) == (0.1, 4)


def test_the_fingerprint_ignores_places_and_processes_but_no_choice():
    base = parse_recipe(MINIMAL)
    assert base.fingerprint() == parse_recipe({**MINIMAL, "output": "elsewhere"}).fingerprint()
    assert base.fingerprint() == parse_recipe({**MINIMAL, "train": {"workers": 2, "min_workers": 1}}).fingerprint()
    assert base.fingerprint() != parse_recipe({**MINIMAL, "seed": 1}).fingerprint()


@pytest.mark.parametrize(("workers", "fewest"), [(2, 3), (0, 1), (2, 0)])
def test_a_worker_group_that_could_not_shrink_is_refused(workers: int, fewest: int) -> None:
    with pytest.raises(ValueError, match=r"min_workers=. is more than workers=.; lower|train\.min_workers: Input should be greater"):
        parse_recipe({**MINIMAL, "train": {"workers": workers, "min_workers": fewest}})


def test_missing_recipe_and_broken_yaml_name_the_file(tmp_path):
    with pytest.raises(ValueError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("name: [")
    with pytest.raises(ValueError, match=r"bad\.yaml is not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")


def test_a_part_refuses_an_unknown_option_and_names_the_near_one():
    table = Kinds("fractions:Fraction", {"d": "fractions:Fraction"})
    with pytest.raises(ValueError, match="did you mean 'numerator'"):
        build_part(table, "d", {"numeratr": 1}, "number")
    with pytest.raises(ValueError, match="unknown number 'c'"):
        build_part(table, "c", {}, "number")
    assert build_part(table, "d", {"numerator": 1, "denominator": 2}, "number") == 0.5
