import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from itm.report.charts import curves, histogram, meter
from itm.report.page import TEMPLATES, Page, render
from pipelines import evaluate, report
from tests.support import ROOT
from tests.support.small_split import small_run

VOID = {"meta", "img", "br"}


class Outline(HTMLParser):
    """Collects headings, tags with the names of their attributes, and all text; fails on a tag that is closed wrongly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.headings, self.tags, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, [name for name, _ in attrs]))
        self.text += "".join(value or "" for _, value in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture
def run(tmp_path):
    recipe = small_run(tmp_path, about="five < six & <script>alert(1)</script>")
    evaluate.evaluate(recipe)
    rows = [{"step": n, "loss": 5 / (n + 1), "itc": 3 / (n + 1), "csa": 2 / (n + 1), "tau": 0.07, "lr": 1e-3 * n} for n in range(20)]
    Path(recipe.folder, "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe


def test_the_page_has_every_section_and_needs_nothing_from_outside(run):
    text = Path(report.report(run)).read_text()
    assert Outline(text).headings == ["Metrics", "Training", "Scores of pairs", "Text finds images", "Image finds text", "Lineage"]
    assert not re.search(r"<script|<link|https?://|@import", text)
    assert text.count("data:image/jpeg;base64,") > 8


def test_text_from_recipes_is_escaped(run):
    text = Path(report.report(run)).read_text()
    assert "five &lt; six &amp; &lt;script&gt;" in text


def hostile_page(text: str) -> Page:
    """A page that says `text` wherever data or recipes can put a word."""
    hit = {"text": text, "image": text, "score": 0.5, "holds": True}
    row = {"text": text, "image": f"{text}2", "right": True, "rank": 1, "hits": [hit]}
    metrics = {"rsum": 1.0, f"t2i_{text}": 2.0}
    evaluation = {"protocol": text, "score_type": text, "counts": {text: 1}, "metrics": metrics, "chance": {"rsum": 0.5}}
    evaluation |= {"split_hash": text, "examples": {"t2i": [row], "i2t": [row]}}
    losses = [{"step": step, text: 1.0, "loss": 2.0, "tau": 3.0} for step in range(2)]
    return Page(text, text, evaluation, losses, {"b" + text: evaluation}, {text: losses}, {f"{text}2": "data:,x"}, {text: text})


def test_no_word_of_captions_keys_names_or_metrics_becomes_markup():
    word = "<script>alert('\"')</script>"
    page = render(hostile_page(word))
    outline, harmless = Outline(page), Outline(render(hostile_page("harmless")))
    assert "<script" not in page and word not in page
    assert outline.tags == harmless.tags
    assert outline.text.count(word) == harmless.text.count("harmless") > 10


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
