"""The demo's verdict: its words for each case, and the record of runs that it judges by."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from pipelines.demo import EXPECTED, EXPECTED_RUNS, PAGE, RUNS, Spread, verdict
from tests.support.demo_spread import RESULT, SETTINGS, Bench, measure, page, prepare, stated

WEAK = {"contrastive": Spread(0.07, 0.02), "shuffled": Spread(0.09, 0.02)}


def results(base: float, cusa: float, shuffled: float) -> list[dict[str, Any]]:
    """Of the three runs, with mAP@R apart by .02 in the two directions."""
    return [{"metrics": {"t2i_map_at_r": value - 0.01, "i2t_map_at_r": value + 0.01}} for value in (base, cusa, shuffled)]


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text())
    return found


def test_gains_of_more_than_twice_the_spread_are_said_to_be_meaning():
    said = verdict(results(0.3, 0.37, 0.28), expected=WEAK)
    assert "over contrastive +0.070 (mean +0.070 ± 0.020" in said
    assert "over shuffled +0.090 (mean +0.090 ± 0.020" in said
    assert "meaning, not smoothing" in said
    assert PAGE not in said


@pytest.mark.parametrize(("base", "shuffled"), [(0.335, 0.29), (0.30, 0.335), (0.355, 0.335)])
def test_a_gain_inside_the_spread_is_not_called_broken(base: float, shuffled: float):
    said = verdict(results(base, 0.37, shuffled), expected=WEAK)
    assert "inside the spread of seeds" in said
    assert "another seed=" in said and PAGE in said
    assert "broken" not in said and "meaning" not in said


@pytest.mark.parametrize(("base", "shuffled"), [(0.38, 0.28), (0.30, 0.35), (0.40, 0.40)])
def test_a_gain_below_the_spread_sends_the_reader_to_the_teacher_join(base: float, shuffled: float):
    said = verdict(results(base, 0.37, shuffled), expected=WEAK)
    assert "broken teacher join, `itm verify -c demo-cusa`" in said
    assert "meaning" not in said


@pytest.mark.parametrize("base", [0.34, 0.40])
def test_an_override_that_changes_the_training_is_named_before_anything_is_blamed(base: float):
    runs = results(base, 0.37, 0.28)
    assert "this run had train.steps=100;" in verdict(runs, ["seed=3", "train.steps=100"], WEAK)
    assert "this run had" not in verdict(runs, ["seed=3", "output=elsewhere", "data.root=elsewhere/shards"], WEAK)


def test_the_runs_of_the_record_get_the_verdict_of_the_record():
    """Every healthy run that was measured: its order is clear, or it is told to lie inside the spread."""
    runs = record()["runs"]
    for setting in SETTINGS:
        for seed in {run["seed"] for run in runs}:
            three = [run for name in RUNS for run in runs if (run["setting"], run["seed"], run["recipe"]) == (setting, seed, name)]
            assert "broken" not in verdict([{"metrics": run} for run in three])


def gains_of(other: str, *ways: str) -> list[float]:
    """CUSA less `other` in mAP@R, mean of `ways`, one a pair of the same seed and setting."""
    figure = {}
    for run in record()["runs"]:
        figure[run["setting"], run["seed"], run["recipe"]] = statistics.fmean(run[f"{way}_map_at_r"] for way in ways)
    places = sorted({place[:2] for place in figure})
    assert len(figure) == len(RUNS) * len(places)
    return [figure[(*place, "demo-cusa")] - figure[(*place, other)] for place in places]


@pytest.mark.parametrize(("name", "other"), [("contrastive", "demo"), ("shuffled", "demo-cusa-shuffled")])
def test_the_expected_gains_are_those_of_the_record(name: str, other: str):
    gains = gains_of(other, "t2i", "i2t")
    assert len(gains) == EXPECTED_RUNS >= 5 * len(SETTINGS)
    assert EXPECTED[name] == Spread(round(statistics.fmean(gains), 3), round(statistics.stdev(gains), 3))
    assert EXPECTED[name].lowest > 0, "else a loss could be told to lie inside the spread"


@pytest.mark.parametrize("way", ["t2i", "i2t"])
@pytest.mark.parametrize("other", ["demo", "demo-cusa-shuffled"])
def test_in_each_direction_the_gain_is_more_than_twice_its_spread(other: str, way: str):
    gains = gains_of(other, way)
    assert statistics.fmean(gains) > 2 * statistics.stdev(gains)


def test_the_record_is_of_the_recipes_as_they_are():
    assert record()["facts"]["recipes"] == {name: stated(name) for name in RUNS}, "measure again: python -m tests.support.demo_spread"


def test_the_page_is_made_from_the_record():
    assert RESULT.with_suffix(".md").read_text() == page(record())


@pytest.mark.e2e
def test_a_restart_trains_only_what_the_record_lacks(tmp_path: Path, ray_local: object):
    sizes = [f"data.source.options.n_{split}={size}" for split, size in {"train": 40, "val": 8, "test": 12}.items()]
    sizes += ["train.steps=2", "train.warmup_steps=1", "train.batch_size=8", "train.validate_every=2", "data.image_size=16"]
    bench, result = Bench(str(tmp_path / "bench"), tuple(sizes)), tmp_path / "spread.json"
    places = [{"setting": setting, "seed": 3, "recipe": name} for setting in SETTINGS for name in RUNS]
    there = [place | {"t2i_map_at_r": 0.5, "i2t_map_at_r": 0.5, "rsum": 300.0, "cpu_s": 1} for place in places]
    there.pop(4)
    result.write_text(json.dumps({"facts": prepare(bench), "runs": there}))
    measured = measure(bench, result, [3])["runs"]
    new = measured.pop(4)
    assert measured == there
    assert (new["setting"], new["seed"], new["recipe"]) == ("avx2", 3, "demo-cusa")
    assert math.isfinite(new["rsum"]) and 0 <= new["t2i_map_at_r"] <= 1
    assert json.loads(result.read_text())["runs"] == [*there[:4], new, *there[4:]]
    result.write_text(json.dumps({"facts": prepare(bench) | {"cpu": "another"}, "runs": there}))
    with pytest.raises(ValueError, match="holds runs with other cpu"):
        measure(bench, result, [3])
