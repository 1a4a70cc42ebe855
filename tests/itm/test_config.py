"""The recipe refuses what it does not know, names the near key, and fingerprints choices only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from itm.config import NO_CHOICES, Part, Recipe, Strict, Train, load_recipe, parse_recipe, resolve_recipe
from itm.kinds import Kinds, build_part
from tests.support.made_before import recorded, unpack

MINIMAL = {"name": "x", "model": {"kind": "dual"}}


def test_an_unknown_key_names_the_near_one():
    with pytest.raises(ValueError, match=r"unknown key 'train\.batchsize'; did you mean 'batch_size'"):
        parse_recipe({**MINIMAL, "train": {"batchsize": 3}})


def test_every_problem_is_reported_at_once():
    with pytest.raises(ValueError, match="train.lr") as error:
        parse_recipe({**MINIMAL, "train": {"lr": -1}, "dta": {}})
    assert "did you mean 'data'" in str(error.value)


@pytest.mark.parametrize("name", ["team/itm", "a.b", "x'y", 'x"y', "a:b", "50%", "a@b", "", " a", "a ", "a\n", "x" * 251])
def test_a_model_name_that_the_registry_refuses_is_refused_in_the_recipe(name: str):
    with pytest.raises(ValueError, match=r"registry\.model: .*MLflow takes no"):
        parse_recipe({**MINIMAL, "registry": {"model": name}})


def test_names_that_mlflow_takes_stay_and_an_experiment_may_hold_more():
    for name in ("itm-matcher", "my model", "größe_2", "a+b (1)"):
        assert parse_recipe({**MINIMAL, "registry": {"model": name}}).registry.model == name
    assert parse_recipe({**MINIMAL, "registry": {"experiment": "/Users/me/a.b: 'x'"}}).registry.experiment == "/Users/me/a.b: 'x'"
    for name in ("", " a", "a\tb", "x" * 251):
        with pytest.raises(ValueError, match=r"registry\.experiment: .*MLflow takes no"):
            parse_recipe({**MINIMAL, "registry": {"experiment": name}})


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


def chain(folder: Path, *files: str) -> Path:
    """a.yaml, b.yaml, ... of these contents; returns the first."""
    for name, text in zip("abcdef", files, strict=False):
        (folder / f"{name}.yaml").write_text(text)
    return folder / "a.yaml"


def test_two_hops_of_extends_are_read_and_a_third_one_names_the_way_out(tmp_path):
    last = "name: x\nmodel: {kind: dual}\ntrain: {lr: 0.5}\n"
    assert load_recipe(chain(tmp_path, "extends: b.yaml", "extends: c.yaml", last)).train.lr == 0.5
    with pytest.raises(ValueError, match=r"a.* -> b\.yaml -> c\.yaml -> d\.yaml is more than 2 hops of `extends`; let b.* start from d"):
        load_recipe(chain(tmp_path, "extends: b.yaml", "extends: c.yaml", "extends: d.yaml", last))


@pytest.mark.parametrize("files", [["extends: a.yaml"], ["extends: b.yaml", "extends: ./a.yaml"]])
def test_a_circle_of_extends_is_refused_by_name(tmp_path, files):
    with pytest.raises(ValueError, match=r"`extends` goes in a circle, a\.yaml -> .*a\.yaml; take one of them out"):
        load_recipe(chain(tmp_path, *files))


def test_a_base_that_is_not_there_is_told_with_the_file_that_wants_it(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe at .*gone\.yaml, which .*a\.yaml extends"):
        load_recipe(chain(tmp_path, "extends: gone.yaml"))
    with pytest.raises(ValueError, match=r"extends takes the name of one recipe file, not \['b\.yaml'\]"):
        load_recipe(chain(tmp_path, "extends: [b.yaml]"))


def test_each_value_is_told_with_the_file_the_override_or_the_default_it_comes_from(tmp_path):
    base = "name: base\nmodel: {kind: dual, options: {width: 8, image: {kind: conv}}}\ntrain: {lr: 0.1, steps: 3}\n"
    first = chain(tmp_path, "extends: b.yaml\nname: x\nmodel: {kind: dual, options: {width: 9}}\n", base)
    found = resolve_recipe(first, ["train.steps=4", "data.flip=true"])
    origin = {key: found.origin(tuple(key.split(".")), value) for key, value in found.recipe.flat().items()}
    assert {key: where for key, where in origin.items() if where != "default"} == {
        "name": "a.yaml",
        "model.kind": "a.yaml",
        "model.options.width": "a.yaml",
        "model.options.image.kind": "b.yaml",
        "train.lr": "b.yaml",
        "train.steps": "override",
        "data.flip": "override",
    }


def test_what_a_replaced_part_was_told_has_no_origin_any_more(tmp_path):
    first = chain(tmp_path, "extends: b.yaml\nname: x\nmodel: {kind: scan}\n", "name: b\nmodel: {kind: dual, options: {width: 8}}\n")
    found = resolve_recipe(first)
    assert found.recipe.model.options == {}
    assert found.origin(("model", "options"), {}) == "default"


def test_the_fingerprint_ignores_places_and_processes_but_no_choice():
    base = parse_recipe(MINIMAL)
    assert base.fingerprint() == parse_recipe({**MINIMAL, "output": "elsewhere"}).fingerprint()
    assert base.fingerprint() == parse_recipe({**MINIMAL, "train": {"workers": 2, "min_workers": 1}}).fingerprint()
    assert base.fingerprint() != parse_recipe({**MINIMAL, "seed": 1}).fingerprint()


class LaterSection(Strict):
    depth: int = 3
    part: Part = Part(kind="flat")


class LaterTrain(Train):
    tempo: float = 1.5


class Later(Recipe):
    """The recipe of a version to come: a key, a part and a section more."""

    train: LaterTrain = Field(default_factory=LaterTrain)
    scorer: Part | None = None
    later: LaterSection = Field(default_factory=LaterSection)


CHOICES = {**MINIMAL, "method": {"kind": "cusa", "options": {"itc": {}}}, "train": {"lr": 0.1, "workers": 2}}
NEW_CHOICES: list[dict[str, Any]] = [
    {"train": {"lr": 0.1, "tempo": 2.0}},
    {"scorer": {"kind": "flat"}},
    {"later": {"depth": 4}},
    {"later": {"part": {"kind": "flat", "options": {"a": None}}}},
]


def test_a_key_that_is_added_later_changes_no_fingerprint_at_its_default() -> None:
    before = parse_recipe(CHOICES).fingerprint()
    said = {"train": {"lr": 0.1, "tempo": 1.5}, "scorer": None, "later": {"depth": 3, "part": {"kind": "flat", "options": {}}}}
    for same in ({}, said):
        assert Later.model_validate(CHOICES | same).fingerprint() == before
    others = [Later.model_validate(CHOICES | new).fingerprint() for new in NEW_CHOICES]
    assert len({before, *others}) == 1 + len(NEW_CHOICES)


def test_options_of_a_part_count_as_they_are_said() -> None:
    said = [{"kind": "matching", "options": options} for options in ({}, {"heads": {}}, {"heads": None}, {"heads": {"uni": False}})]
    assert len({parse_recipe({**MINIMAL, "method": method}).fingerprint() for method in said}) == len(said)
    assert parse_recipe({**MINIMAL, "method": said[0]}).fingerprint() == parse_recipe(MINIMAL).fingerprint()


def test_the_fingerprint_of_0_1_0_is_found_from_the_recipe_that_it_recorded(tmp_path: Path) -> None:
    unpack(tmp_path, "runs")
    for name, fingerprint in recorded()["fingerprints"].items():
        started = json.loads((tmp_path / "runs" / name / "started.json").read_text())
        assert started["recipe_fingerprint"] == fingerprint
        recipe = load_recipe(tmp_path / "recipe.yaml", [f"name={name}"])
        assert recipe.whole_fingerprint(started["recipe"]) == fingerprint != recipe.fingerprint()
        said = recipe.model_dump(mode="json", exclude_defaults=True)
        assert Later.model_validate(said).whole_fingerprint(started["recipe"]) == fingerprint
        for new in NEW_CHOICES:
            new = {key: {**said.get(key, {}), **value} for key, value in new.items()}
            assert Later.model_validate(said | new).whole_fingerprint(started["recipe"]) is None
        other = load_recipe(tmp_path / "recipe.yaml", [f"name={name}", "train.lr=0.02"])
        assert other.whole_fingerprint(started["recipe"]) != fingerprint


def test_no_default_of_0_1_0_that_makes_a_run_another_one_has_changed() -> None:
    """A fingerprint leaves defaults out: with another one an old run would look as if it had been made with it. Add a key instead.

    What no fingerprint holds, such as how many threads decode, may have another default."""
    before, now = recorded()["defaults"], parse_recipe(MINIMAL).model_dump(mode="json")
    for section, keys in before.items():
        free = NO_CHOICES.get(section, ())
        if free is True:
            continue
        if isinstance(keys, dict):
            assert {key: now[section][key] for key in keys if key not in free} == {k: v for k, v in keys.items() if k not in free}, section
        else:
            assert now[section] == keys, section


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
