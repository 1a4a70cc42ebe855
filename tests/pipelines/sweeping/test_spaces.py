"""The spaces of a sweep: read from the command line, refused by name, drawn the same way each time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from itm.config import Recipe, load_recipe, parse_recipe
from pipelines.cli import RECIPES
from pipelines.sweeping.driver import check_recipe, sweep, winner
from pipelines.sweeping.spaces import Space, draw, parse_space, parse_spaces, with_choices
from pipelines.sweeping.trials import Asked


def recipe(**train: Any) -> Recipe:
    return parse_recipe({"name": "run", "model": {"kind": "dual", "options": {"width": 8}}, "train": {"steps": 4, **train}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.lr=log(1e-5,1e-3)", Space("train.lr", "log", (1e-5, 1e-3))),
        ("train.lr = log( 0.1 , 1 )", Space("train.lr", "log", (0.1, 1))),
        ("train.batch_size=int(2,9)", Space("train.batch_size", "int", (2, 9))),
        ("train.optimizer=choice(adam, adamw)", Space("train.optimizer", "choice", ("adam", "adamw"))),
        ("model.options.x=choice(true, 1e-3, 'a,b', null)", Space("model.options.x", "choice", (True, 1e-3, "a,b", None))),
    ],
)
def test_a_space_is_read_as_recipes_write_values(text: str, expected: Space) -> None:
    assert parse_space(text) == expected


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ([], "a sweep needs a space"),
        (["lr"], r"'lr' is not of the form key=log\(low,high\)"),
        (["train.lr=lgo(1,2)"], r"train\.lr: unknown distribution 'lgo'; did you mean 'log'\?"),
        (["train.lr=log(0,1)"], r"train\.lr: log\(0,1\) has to be two numbers above 0, the smaller one first"),
        (["train.lr=uniform(2,1)"], r"train\.lr: uniform\(2,1\) has to be two numbers"),
        (["train.lr=uniform(1)"], r"train\.lr: uniform\(1\) has to be two numbers"),
        (["train.batch_size=int(2.5,9)"], r"train\.batch_size: int\(2\.5,9\) has to be two whole numbers"),
        (["train.lr=choice()"], r"train\.lr: choice\(\) has nothing to choose of"),
        (["train.lr=choice([)"], r"train\.lr: choice\(\[\) is no list of values"),
        (["train.lrr=log(1,2)"], r"train\.lrr: unknown key 'train\.lrr'; did you mean 'lr'\?"),
        (["train.lr=uniform(-1,1)"], r"train\.lr: train\.lr: Input should be greater than 0"),
        (["train.optimizer=choice(adam,adma)"], r"train\.optimizer: .*Input should be 'adam', 'adamw'"),
        (["train.lr=log(1,2)", "train.lr=log(1,2)"], r"train\.lr is given twice"),
        (["train.workers=choice(1,2)"], r"train\.workers: trials may not differ in it"),
        (["data.root=choice(a,b)"], r"data\.root: trials may not differ in it"),
        (["name=choice(a,b)"], r"name: trials may not differ in it"),
    ],
)
def test_a_bad_space_is_refused_in_one_line_that_names_its_key(texts: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        parse_spaces(texts, recipe())
    assert "\n" not in str(refused.value)


def test_draws_lie_in_their_spaces_and_a_larger_sweep_begins_with_the_trials_of_a_smaller_one() -> None:
    spaces = [parse_space(text) for text in ("train.lr=log(1e-5,1e-1)", "train.batch_size=int(3,5)", "method.options.tau=uniform(0.1,0.2)")]
    drawn = draw(spaces, seed=1, count=200)
    assert drawn[:7] == draw(spaces, seed=1, count=7) != draw(spaces, seed=2, count=7)
    rates, sizes, taus = (sorted(choices[space.key] for choices in drawn) for space in spaces)
    assert rates[0] >= 1e-5 and rates[-1] <= 1e-1
    assert math.log10(rates[100]) == pytest.approx(-3, abs=0.5), "the middle of a logarithmic space is that of its exponents"
    assert set(sizes) == {3, 4, 5}
    assert taus[0] >= 0.1 and taus[-1] <= 0.2 and taus[100] == pytest.approx(0.15, abs=0.02)
    assert all(float(f"{rate:.4g}") == rate for rate in rates)


def test_no_two_trials_are_alike_and_a_small_space_ends() -> None:
    drawn = draw([parse_space("train.optimizer=choice(adam,adamw)"), parse_space("train.accumulate=int(1,2)")], seed=0, count=50)
    assert sorted((choices["train.optimizer"], choices["train.accumulate"]) for choices in drawn) == [
        ("adam", 1),
        ("adam", 2),
        ("adamw", 1),
        ("adamw", 2),
    ]


def test_the_recipe_of_the_winner_is_the_own_recipe_with_its_choices(tmp_path) -> None:
    own = load_recipe(RECIPES / "demo-cusa.yaml", ["train.steps=7"])
    choices = {"train.lr": 1.234e-05, "model.options.width": 64}
    path = tmp_path / "best.yaml"
    path.write_text(winner(own, {"number": 3, "choices": choices, "value": 12.5, "step": 6}, 8))
    read = load_recipe(path)
    assert (read.train.lr, read.train.steps, read.model.options["width"], read.name) == (1.234e-05, 7, 64, "demo-cusa-best")
    assert "trial 003 of 8" in read.about
    back = with_choices(read, {"train.lr": own.train.lr, "model.options.width": own.model.options["width"]})
    assert back.model_copy(update={"name": own.name}).fingerprint() == own.fingerprint()
    assert yaml.safe_load(path.read_text())["data"] == own.data.model_dump(mode="json", exclude_unset=True)


def test_what_a_trial_cannot_do_is_refused_before_any_work(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"train\.workers=2: a trial trains in one process.*train\.batch_size=256"):
        check_recipe(recipe(workers=2))
    with pytest.raises(ValueError, match=r"itm sweep watches registry\.metric, and 'x' is not what validations measure"):
        check_recipe(recipe().model_copy(update={"registry": recipe().registry.model_copy(update={"metric": "x"})}))
    with pytest.raises(ValueError, match=r"--space train\.lr: log"):
        sweep(recipe().model_copy(update={"output": str(tmp_path)}), Asked(["train.lr=log(2,1)"]))
    assert not list(tmp_path.iterdir())
