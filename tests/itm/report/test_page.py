import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from itm.data.formats import NewerFormat
from itm.report.charts import bars, curves, histogram, meter
from itm.report.looks import looks
from itm.report.page import TEMPLATES, render
from itm.report.shown import Page
from pipelines import evaluate, report
from pipelines.cli import stage_main
from tests.support import ROOT
from tests.support.markup import Outline
from tests.support.small_split import records, small_run, write_split


@pytest.fixture
def run(tmp_path):
    recipe = small_run(tmp_path, about="five < six & <script>alert(1)</script>")
    evaluate.evaluate(recipe)
    rows = [{"step": n, "loss": 5 / (n + 1), "itc": 3 / (n + 1), "csa": 2 / (n + 1), "tau": 0.07, "lr": 1e-3 * n} for n in range(20)]
    Path(recipe.folder, "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe


def test_the_page_has_every_section_and_needs_nothing_from_outside(run):
    text = Path(report.report(run)).read_text()
    sections = ["Metrics", "Training", "Ranks of the answers", "Scores of pairs", "Text finds images", "Image finds text", "Worst queries"]
    assert Outline(text).headings == [*sections, "Images like images, texts like texts", "Lineage", "Not on this page"]
    assert not re.search(r"<script|<link|https?://|@import", text)
    assert text.count("data:image/jpeg;base64,") > 8


def test_text_from_recipes_is_escaped(run):
    text = Path(report.report(run)).read_text()
    assert "five &lt; six &amp; &lt;script&gt;" in text


def hostile_page(text: str) -> Page:
    """A page that says `text` wherever data or recipes can put a word."""
    hit = {"text": text, "image": text, "score": 0.5, "holds": True, "row": 3}
    row = {"text": text, "image": f"{text}2", "right": True, "rank": 1, "hits": [hit], "answer": hit | {"row": 4}}
    metrics = {"rsum": 1.0, f"t2i_{text}": 2.0}
    evaluation = {"protocol": text, "score_type": text, "counts": {text: 1}, "metrics": metrics, "chance": {"rsum": 0.5}}
    evaluation |= {"split_hash": text, "examples": {"t2i": [row], "i2t": [row]}, "worst": {"t2i": [row], "i2t": [row]}}
    boxes, weights = [[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]], [[0.2, 0.8]]
    look = {"image": f"{text}2", "text": text, "words": [text], "boxes": boxes, "weights": weights}
    evaluation["attention"] = [look | {"grid": True}, look | {"grid": False}]
    losses = [{"step": step, text: 1.0, "loss": 2.0, "tau": 3.0} for step in range(2)]
    evaluation["similar"] = {"i2i": [row], "t2t": [row]}
    both = {"own": row | {"hits": [hit]}, "other": row | {"hits": [hit]}}
    shared = {"queries": 2, "counts": dict.fromkeys(("both", "own", "other", "neither"), 1), "own": [both], "other": [both]}
    return Page(
        text,
        text,
        evaluation,
        losses,
        {"b" + text: evaluation},
        {text: losses},
        {f"{text}2": "data:,x"},
        {text: text},
        missing=[text],
        protocols={text: evaluation},
        pictures=hostile_pictures(text),
        photo="data:,x",
        disagreements={text: {"t2i": shared, "i2t": shared}},
    )


def hostile_pictures(text: str) -> dict[str, Any]:
    """Every picture of a pair and of a batch, with `text` for each word, key, kind and name."""
    block, words = [[0.6, 0.4], [0.3, 0.7]], [text, text]
    relations = dict.fromkeys(("LL", "VV", "extracted", "LV", "VL"), block) | {"words": words, "regions": 2, "partner": [1, 0]}
    told = {
        "kind": text,
        "score": 0.5,
        "attention": {"words": words, "weights": block, "boxes": [[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]], "grid": False},
        "relations": relations | {"cosines": True, "isd": {"L_singular": 0.1}},
        "gates": {"nodes": words, "gates": [0.4, 0.6]},
        "edges": {"nodes": words, "steps": [block, block[:1]], "share": [0.5, 0.5]},
        "cut": {"words": words, "best": [0.1, 0.9], "directions": {text: {"t": 0.5, "cut": [True, False]}}},
        "lacks": [text],
    }
    image = {"image": f"{text}2", "shard": text, "own": True, "target": 0.5, "student": 0.5}
    row = {"caption": text, "text": text, "teacher_tau": 0.05, "student_tau": 0.05, "rest": {"target": 0.0, "student": 0.0}}
    twin = image | {"own_image": f"{text}2", "text": text, "teacher_image": 0.9, "teacher_text": 0.9, "student_rank": 1}
    spread = {"edges": [0.0, 0.5, 1.0], "teacher": [1.0, 0.0], "student": [0.0, 1.0], "rank_correlation": 0.5}
    soft = {"pairs": 2, "split": text, "teachers": {"image": text, "text": text}, "histograms": {"image": spread}}
    soft |= {"row": row | {"images": [image]}, "alike": {"count": 1, "negatives": 2, "pairs": [twin]}}
    state = {"t": 0.5, "t_safe": 0.4, "mu_pos": 0.7, "sigma_pos": 0.1, "mu_neg": 0.2, "sigma_neg": 0.1}
    seen = {"edges": [0.0, 0.5, 1.0], "matched": [0.5, 1.5], "mismatched": [1.5, 0.5], "fragments": 4, "state": state}
    return {
        "pair": {"image": f"{text}2", "caption": text, "text": text, "shard": text, "own": True},
        "models": {text: told},
        "batch": {"soft_labels": soft, "maxima": {"split": text, "pairs": 2, "directions": {text: seen}}, "lacks": [text]},
        "fits": {text: [{"step": 1, "epoch": 1, **state}]},
        "lacks": [text],
    }


def test_no_word_of_captions_keys_names_or_metrics_becomes_markup():
    word = "<script>alert('\"')</script>"
    page = render(hostile_page(word))
    outline, harmless = Outline(page), Outline(render(hostile_page("harmless")))
    assert "<script" not in page and word not in page
    assert outline.tags == harmless.tags
    assert outline.text.count(word) == harmless.text.count("harmless") > 10


def test_every_other_protocol_of_the_same_weights_has_a_table_under_its_own_name(run):
    write_split(Path(run.data.root) / "val", records(5))
    found = [evaluate.evaluate(run, protocol="t2t"), evaluate.evaluate(run, split="val")]
    other = json.loads(Path(run.folder, "evaluation-t2t.json").read_text())
    Path(run.folder, "evaluation-sts.json").write_text(json.dumps(other | {"matcher_hash": "of other weights", "protocol_name": "sts"}))
    text = Path(report.report(run)).read_text()
    part = text[text.index("<h2>Other protocols") : text.index("<h2>Training")]
    assert re.findall(r"<h3>([^<]+)</h3>", part) == ["test/t2t", "val/auto"]
    for result in found:
        for name, value in result["metrics"].items():
            assert f"<td>{name}</td><td>{value:.4f}</td>" in part or f"<td>{name}</td><td>{value:.2f}</td>" in part


def test_what_one_run_got_right_and_the_other_wrong_is_shown_with_the_counts_of_all_queries(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run.folder, other)
    said = json.loads((other / "answers.json").read_text())
    found = said["t2i"]["holds"]
    said["t2i"]["holds"] = [[1 - row[0], *row[1:]] for row in found]
    (other / "answers.json").write_text(json.dumps(said))
    page = report.page_of(run, [str(other)])
    right = sum(row[0] for row in found)
    assert page.disagreements["other"]["t2i"]["counts"] == {"both": 0, "own": right, "other": len(found) - right, "neither": 0}
    text = Path(report.report(run, [str(other)], page)).read_text()
    assert f"Where {run.name} and other disagree" in text and "Curves of the compared runs" in text
    assert text.count(f"{run.name}: its own image is at rank") == sum(min(4, n) for n in (right, len(found) - right))
    (other / "answers.json").unlink()
    lost = f"what other got right and this run wrong: {other} has no answers.json; evaluate it again"
    assert lost in report.page_of(run, [str(other)]).missing


def test_pictures_of_a_pair_are_made_once_and_again_when_the_weights_are_others(run):
    evaluation, kept = Path(run.folder, "evaluation.json"), Path(run.folder, "pictures.json")
    said = json.loads(evaluation.read_text())
    said["examples"]["t2i"][0]["right"] = True  # fresh weights may find no image of a caption
    evaluation.write_text(json.dumps(said))
    page = report.page_of(run)
    assert list(page.pictures["models"]) == ["small"]
    first = kept.read_text()
    assert report.page_of(run).pictures == page.pictures and kept.read_text() == first
    said = json.loads(first)
    said["identity"]["matcher_hash"] = "another"
    kept.write_text(json.dumps(said))
    assert report.page_of(run).pictures["identity"] == page.pictures["identity"]
    assert report.page_of(run, pictures=False).pictures == {}


@pytest.mark.parametrize("name", ["pictures.json", "answers.json"])
def test_what_a_later_version_keeps_for_the_page_is_refused_by_name_and_stays(run, tmp_path, name):
    shutil.copytree(run.folder, tmp_path / "other")
    evaluation = Path(run.folder, "evaluation.json")
    said = json.loads(evaluation.read_text())
    said["examples"]["t2i"][0]["right"] = True
    evaluation.write_text(json.dumps(said))
    kept = Path(run.folder, name)
    kept.write_text(json.dumps({"format": 2}))
    with pytest.raises(NewerFormat, match=f"{name} has format 2, this version reads up to 1"):
        report.page_of(run, [str(tmp_path / "other")])
    assert json.loads(kept.read_text()) == {"format": 2}


def test_the_wheel_ships_everything_that_the_page_is_made_of():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["itm.report"]
    shipped = {path for pattern in data for path in TEMPLATES.parent.glob(pattern)}
    assert shipped == {
        path for path in TEMPLATES.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".py"
    }


def test_the_numbers_of_the_evaluation_and_their_chance_are_on_the_page(run):
    text = Path(report.report(run)).read_text()
    found = json.loads(Path(run.folder, "evaluation.json").read_text())
    assert f"<b>{found['metrics']['rsum']:.1f}</b>" in text
    assert f"chance {found['chance']['rsum']:.1f}" in text
    assert found["split_hash"] in text
    assert found["matcher_hash"] in text


def test_compared_runs_stand_in_the_order_given_with_the_best_of_each_column_marked(run, tmp_path):
    other = json.loads(Path(run.folder, "evaluation.json").read_text())
    other["metrics"]["rsum"] += 100
    (tmp_path / "better").mkdir()
    (tmp_path / "better" / "evaluation.json").write_text(json.dumps(other))
    text = Path(report.report(run, [str(tmp_path / "better"), run.folder])).read_text()
    table = text[text.index("Runs compared") : text.index("<h2>Metrics")]
    assert table.index("<td>better</td>") < table.index("<td>small</td>") < table.index("<td>chance</td>")
    assert f"<td class=best>{other['metrics']['rsum']:.1f}</td>" in table
    assert "cannot be compared" not in table


def test_runs_measured_on_other_data_carry_a_warning(run, tmp_path):
    other = json.loads(Path(run.folder, "evaluation.json").read_text()) | {"split_hash": "another"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "evaluation.json").write_text(json.dumps(other))
    assert "measured on different data or protocols" in Path(report.report(run, [str(tmp_path / "other")])).read_text()


def test_a_run_that_was_not_evaluated_is_refused_with_the_remedy(tmp_path):
    recipe = small_run(tmp_path)
    with pytest.raises(ValueError, match="no evaluation.json in .*small; run `itm evaluate`"):
        report.report(recipe)


def test_a_uni_modal_evaluation_without_losses_still_makes_a_page():
    evaluation = {"protocol": "p", "score_type": "s", "counts": {"rows": 3}, "metrics": {"i2i_r1": 50.0, "i2i_map_at_r": 0.5}, "chance": {}}
    assert Outline(render(Page("x", "", evaluation))).headings == ["Metrics"]


def test_a_curve_starts_and_ends_at_the_corners_of_its_data():
    svg = curves({"loss": [(0, 4.0), (10, 0.0)]}, "step", "loss")
    assert 'points="52.0,12.0 628.0,220.0"' in svg


def test_points_that_are_not_finite_are_left_out_and_an_empty_chart_is_nothing():
    assert "nan" not in curves({"loss": [(0, 1.0), (1, float("nan")), (2, 0.5)]}, "step", "loss")
    assert curves({"loss": []}, "step", "loss") == ""


def test_bars_and_meters_have_the_size_of_their_values():
    assert 'height="208.0"' in histogram([0.0, 1.0, 2.0], {"a": [1.0, 0.5], "b": [0.0, 0.5]}, "score")
    assert meter(25.0, 10.0, 100.0) == '<span class="meter"><b style="width:25.00%"></b><i style="left:10.00%" title="chance"></i></span>'


def test_a_query_says_where_its_own_answer_is_and_shows_it_where_it_was_not_found(run):
    text = Path(report.report(run)).read_text()
    found = json.loads(Path(run.folder, "evaluation.json").read_text())
    rows = [row for shown in (found["examples"], found["worst"]) for way in ("t2i", "i2t") for row in shown[way]]
    apart = [row for row in rows if row["answer"]["row"] not in [hit["row"] for hit in row["hits"]]]
    assert text.count("its own:") + text.count("<b>its own</b>") == len(apart) > 0
    wrong = [row for row in found["worst"]["t2i"] if not row["right"]]
    assert all(f"wrong: its own image is at rank {row['rank']}" in text for row in wrong) and wrong


def test_the_page_says_when_and_on_what_it_was_made_and_how_large_the_splits_are(run):
    said = report.page_of(run).lineage
    made = json.loads(Path(run.folder, "evaluation.json").read_text())["environment"]
    assert said["Evaluated"] == f"{made['date'].replace('T', ' ').replace('+00:00', ' UTC')}, {made['device']}"
    assert f"torch {torch.__version__}" in said["Versions"] and "cores" in said["Machine"]
    assert said["Splits"] == "test 12 images, 60 captions, 0 rejected"


def test_what_is_missing_is_named_with_what_would_bring_it_on_the_page_and_in_the_terminal(run, tmp_path, capsys):
    choices = tmp_path / "r.json"
    choices.write_text(run.model_dump_json())
    path = Path(run.folder, "evaluation.json")
    earlier = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in earlier.items() if name not in ("ranks", "worst", "environment")}))
    assert stage_main("report", ["-c", str(choices)]) == 0
    first, *missing = capsys.readouterr().out.splitlines()
    assert first == f"{run.folder}/report.html"
    assert missing == [
        f"not on the page: the training: no run.json in {run.folder}; the matcher was made elsewhere, or `itm train` has not ended",
        "not on the page: ranks and worst queries: an earlier version evaluated this run; "
        "delete evaluation.json, and run `itm evaluate` again",
    ]
    assert "Not on this page" in Path(first).read_text()


def test_patches_darken_where_a_word_does_not_look_and_regions_are_outlined_by_strength():
    boxes = [[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]
    row = {"image": "a", "text": "red", "words": ["red"], "boxes": boxes, "weights": [[0.2, 0.8]]}
    (patches,), (regions,) = looks([row | {"grid": True}])[0].words, looks([row | {"grid": False}])[0].words
    assert re.findall(r'x="([\d.]+)".*?fill-opacity="([\d.]+)"', patches.overlay) == [("0.0000", "0.58"), ("0.5000", "0.00")]
    assert re.findall(r'x="([\d.]+)".*?stroke-opacity="([\d.]+)"', regions.overlay) == [("0.0000", "0.25"), ("0.5000", "1.00")]
    assert patches.most == 0.8


def test_the_words_that_look_most_sharply_are_shown_in_the_order_of_the_caption():
    weights = [[0.5, 0.5], [0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.1, 0.9], [0.8, 0.2], [0.2, 0.8], [0.55, 0.45]]
    row = {"image": "a", "text": "", "words": list("abcdefgh"), "boxes": [[0, 0, 1, 1]] * 2, "weights": weights, "grid": True}
    assert "".join(word.text for word in looks([row])[0].words) == "bcdefg"


def test_bars_stand_side_by_side_with_a_mark_of_chance_at_each():
    svg = bars(["1", "2"], {"queries": [50.0, 25.0]}, [10.0, 100.0], "chance", "rank", "percent")
    assert re.findall(r'class="bar c0".*?height="([\d.]+)"', svg) == ["104.0", "52.0"]
    assert len(re.findall('class="mark"', svg)) == 2 and "chance</span>" in svg
