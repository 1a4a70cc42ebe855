"""`itm evaluate` at scale: large splits go to tiles by themselves, pruning and screening report what they did, bad choices are refused."""

import json
from pathlib import Path

import pytest

import itm
from itm.config import Part
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import WordVocabulary
from itm.matchers.folder import build_matcher, save_matcher
from pipelines.cli import stage_main
from pipelines.evaluating import driver as evaluate
from pipelines.on_ray import scoring as score
from pipelines.on_ray.options import How
from tests.support.small_split import records, small_run

UARDA = Part(
    kind="uarda",
    options={
        "image": {"kind": "conv", "image_size": 64},
        "text": {"kind": "gru", "word_dim": 8, "width": 16},
        "eval_threshold": 0.1,
    },
)


def late_run(folder: Path, count: int = 12):
    """As `small_run`, with a UARDA matcher beside the dual encoder; returns the recipe and the folder of the UARDA matcher."""
    recipe = small_run(folder, count)
    texts = [caption.text for row in records(count) for caption in row.captions]
    inputs = Inputs(ImageInput(size=64, crop="squash"), WordVocabulary.from_captions(texts, min_count=1))
    save_matcher(build_matcher(UARDA, inputs), f"{recipe.folder}/uarda")
    return recipe, f"{recipe.folder}/uarda"


def command(recipe, *arguments: str) -> int:
    path = Path(recipe.folder).parent / "recipe.yaml"
    path.write_text(recipe.model_dump_json())
    return stage_main("evaluate", ["-c", str(path), *arguments])


def results(recipe, pattern: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in Path(recipe.folder).glob(pattern)]


def test_pruned_metrics_are_the_unpruned_ones_and_the_share_the_engine_and_the_times_are_reported(tmp_path, capsys):
    recipe, uri = late_run(tmp_path)
    plain = evaluate.evaluate(recipe, uri)
    assert command(recipe, "--matcher", uri, "--prune", "auto") == 0
    pruned = results(recipe, "evaluation-*.json")[0]
    assert pruned["metrics"] == plain["metrics"]
    report = pruned["pruning"][0]
    assert 0 <= report["p"] <= 1 and report["engine"]["t2i"] in ("packed", "all")
    assert f"pruning: {report['p']:.1%} of fragments pruned" in capsys.readouterr().out
    assert "pruning" not in plain


def test_another_threshold_is_evaluated_under_a_name_of_its_own(tmp_path, capsys):
    recipe, uri = late_run(tmp_path)
    plain = evaluate.evaluate(recipe, uri)
    assert command(recipe, "--matcher", uri, "--eval-threshold", "0.6", "--prune", "on") == 0
    cut = results(recipe, "evaluation-*-threshold-0.6.json")[0]
    assert cut["eval_threshold"] == 0.6
    assert cut["pruning"][0]["p"] > 0
    changed = Part(kind="uarda", options={**UARDA.options, "eval_threshold": 0.6})
    inputs = itm.load_matcher(uri).inputs
    other = build_matcher(changed, inputs)
    other.load_state_dict(itm.load_matcher(uri).state_dict())
    save_matcher(other, f"{recipe.folder}/cut")
    want = evaluate.evaluate(recipe, f"{recipe.folder}/cut")
    assert cut["metrics"] == want["metrics"]
    assert evaluate.evaluate(recipe, uri) == json.loads(json.dumps(plain)), "the result of record stands as it was"
    assert command(recipe, "--matcher", uri, "--eval-threshold", "t") == 0
    assert results(recipe, "evaluation-*-threshold-t.json")[0]["eval_threshold"] == "t"


def test_a_screen_that_proposes_everything_gives_the_exact_metrics_under_a_name_of_its_own(tmp_path, capsys):
    recipe, uri = late_run(tmp_path)
    exact = evaluate.evaluate(recipe, uri)
    assert command(recipe, "--matcher", uri, "--screen", "1000") == 0
    screened = results(recipe, "evaluation-*-screened.json")[0]
    assert screened["metrics"] == pytest.approx(exact["metrics"])
    assert screened["screen"]["scored"] == 1.0
    assert screened["screen"]["loss"]["t2i"]["r10"]["lost"] == 0.0
    assert screened["score_type"] == "UARDA score, fp32-screened"
    assert "APPROXIMATE, 1000 candidates a side, 100.00% of the pairs scored" in capsys.readouterr().out
    assert evaluate.evaluate(recipe, uri) == json.loads(json.dumps(exact))


def test_auto_keeps_the_wanted_loss_with_the_vectors_of_another_matcher(tmp_path):
    recipe, uri = late_run(tmp_path, 40)
    how = How(screen="auto", screen_loss=0.1, screen_matcher=f"{recipe.folder}/matcher")
    result = evaluate.evaluate(recipe, uri, how=how)
    rows = result["screen"]["loss"]
    assert all(rows[way][at]["high"] <= 10 for way in rows for at in ("r1", "r5", "r10"))
    assert 0 < result["screen"]["scored"] <= 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["--prune", "on"], "--prune on needs a UARDA matcher"),
        (["--eval-threshold", "0.3"], "--eval-threshold 0.3 needs a UARDA matcher"),
        (["--eval-threshold", "high"], "--eval-threshold takes t, t_safe or a number, not 'high'"),
        (["--screen", "many"], "--screen takes a number of candidates or auto, not 'many'"),
        (["--screen", "0"], "--screen takes a number of candidates or auto, not '0'"),
        (["--screen", "auto", "--screen-loss", "2"], "--screen-loss is a share between 0 and 1"),
        (["--screen", "5", "--distributed"], "choose one of them"),
    ],
)
def test_choices_that_cannot_be_met_are_one_line_and_exit_code_2(tmp_path, capsys, choice, message):
    assert command(small_run(tmp_path), *choice) == 2
    assert message in capsys.readouterr().err


def test_a_matrix_past_the_memory_bound_goes_to_tiles_and_so_do_many_costly_pairs(tmp_path, monkeypatch):
    recipe, uri = late_run(tmp_path)
    monkeypatch.setattr(score, "by_actors", lambda tiles: pytest.fail("went to tasks"))
    evaluate.evaluate(recipe)
    monkeypatch.setattr(score, "IN_PROCESS_PAIRS", 100)
    evaluate.evaluate(recipe, tie="optimistic")
    with pytest.raises(pytest.fail.Exception):
        evaluate.evaluate(recipe, uri)
    monkeypatch.setattr(score, "DENSE_BYTES", 100)
    with pytest.raises(pytest.fail.Exception):
        evaluate.evaluate(recipe, tie="official")
