"""`itm explain`: one pair, its numbers as JSON and its page, and what is said where a pair, a model or a picture is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from itm.evaluation.scoring import score_matrix
from itm.matchers.folder import save_matcher
from itm.matchers.mean import Mean
from pipelines.cli import stage_main
from pipelines.explain import explain
from tests.support import pair_world
from tests.support.markup import Outline


@pytest.fixture
def world(tmp_path: Path):
    rows = pair_world.split(tmp_path / "test")
    return rows, str(tmp_path / "test"), {kind: pair_world.saved(kind, rows, tmp_path / kind) for kind in pair_world.OPTIONS}


def test_the_numbers_of_a_pair_are_printed_and_the_page_is_made_of_them_alone(world, tmp_path, monkeypatch, capsys):
    rows, shards, folders = world
    monkeypatch.chdir(tmp_path)
    given = ["--model", folders["saf"], "--model", folders["sgr"], "--shards", shards, "--pair", rows[2].key]
    assert stage_main("explain", [*given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pair"]["image"] == rows[2].key and told["pair"]["text"] == rows[2].captions[0].text and told["pair"]["own"]
    assert list(told["models"]) == ["saf", "sgr"] and not list(tmp_path.glob("*.html"))
    for kind in ("saf", "sgr"):
        matcher = pair_world.matcher_of(kind, rows)
        assert rows[2].regions is not None
        images, captions = matcher.inputs.images([rows[2].regions.to_npz()]), matcher.inputs.captions([told["pair"]["text"]])
        assert told["models"][kind]["score"] == pytest.approx(float(score_matrix(matcher, images, captions)[0, 0]), abs=1e-6)
    assert stage_main("explain", given) == 0
    name = capsys.readouterr().out.strip()
    text = Path(name).read_text()
    assert name == f"explain-{rows[2].key}.html"
    outline = Outline(text)
    shown = ["Where words look", "Relations of the pair", "Gates of the words", "Edges of the reasoning steps", "Not on this page"]
    assert outline.headings == shown
    assert not re.search(r"<script|<link|https?://|@import", text)
    gates = told["models"]["saf"]["gates"]
    chips = re.findall(r'<span class="chip"><b>([^<]+)</b><i>([\d.]+)</i>', text)
    assert chips[: len(gates["nodes"])] == [(n, f"{g:.3f}") for n, g in zip(gates["nodes"], gates["gates"], strict=True)]
    assert "saf: edges of the reasoning steps: saf reasons over no graph: sgr and sgraf do" in outline.text
    squares = re.findall(r"<title>whole pair, (\w[\w ]*): ([\d.]+)</title>", text)
    assert squares[: len(gates["nodes"])] == [
        (n, f"{v:.3f}") for n, v in zip(gates["nodes"], told["models"]["sgr"]["edges"]["steps"][0][0], strict=True)
    ]


def test_two_states_of_a_matcher_stand_side_by_side_on_one_scale(world, tmp_path):
    rows, shards, folders = world
    after = pair_world.saved("uniter", rows, tmp_path / "after", seed=5)
    told, page = explain([folders["uniter"], after], shards, rows[0].key)
    before, later = (one["relations"]["LL"] for one in told["models"].values())
    assert before != later
    most = max(max(map(max, block)) for block in (before, later))
    card = page[page.index("S_LL") : page.index("S_VV in the words")]
    opacities = [float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', card)]
    wanted = [value / most for block in (before, later) for row in block for value in row]
    assert opacities == pytest.approx(wanted, abs=6e-4)
    assert re.findall(r"<h4>(\w+)</h4>", card) == ["uniter", "after"]


def test_a_caption_of_another_image_makes_a_pair_too(world):
    rows, shards, folders = world
    told, page = explain([folders["uarda"]], shards, rows[0].key, rows[5].captions[1].id)
    assert told["pair"]["text"] == rows[5].captions[1].text and not told["pair"]["own"]
    assert "of another image" in page


def test_a_mean_shows_each_of_its_members(world, tmp_path):
    rows, shards, folders = world
    save_matcher(Mean.of([pair_world.matcher_of(kind, rows) for kind in ("saf", "sgr")]), str(tmp_path / "both"))
    told, _ = explain([str(tmp_path / "both")], shards, rows[2].key)
    apart, _ = explain([folders["saf"], folders["sgr"]], shards, rows[2].key)
    assert list(told["models"]) == ["both: saf", "both: sgr"]
    assert told["models"]["both: saf"] == apart["models"]["saf"] and told["models"]["both: sgr"] == apart["models"]["sgr"]


def test_a_matcher_of_vectors_has_a_page_that_says_what_it_cannot_show(world):
    rows, shards, folders = world
    told, page = explain([folders["dual"]], shards, rows[0].key)
    assert Outline(page).headings[-1] == "Not on this page"
    assert len(told["models"]["dual"]["lacks"]) == page.count("<li>") >= 4
    assert "where the words look: dual compares one vector a side: nothing attends" in told["models"]["dual"]["lacks"]


def test_what_is_not_there_is_named_with_what_is(world, capsys):
    rows, shards, folders = world
    given = ["--model", folders["dual"], "--shards", shards, "--pair"]
    for words, said in (
        (["nothing"], f"holds no image 'nothing'; keys look like '{rows[0].key}'"),
        ([rows[1].key, "lost"], f"holds no caption 'lost'; those of image '{rows[1].key}' are {rows[1].captions[0].id}"),
        ([rows[1].key, "a", "b"], "--pair takes an image's key and a caption's id, not 3 words"),
    ):
        assert stage_main("explain", [*given, *words]) == 2
        assert said in capsys.readouterr().err
    assert stage_main("explain", ["--pair", "x"]) == 2
    assert "-c RECIPE, or --model URI --shards FOLDER" in capsys.readouterr().err


def test_no_word_of_a_caption_or_key_becomes_markup(tmp_path):
    from dataclasses import replace

    from tests.support.small_split import write_split

    rows = pair_world.split(tmp_path / "test")
    word = "<script>alert('\"')</script>"
    rows[0] = replace(rows[0], captions=[replace(rows[0].captions[0], text=f"{word} {rows[0].captions[0].text}")])
    write_split(tmp_path / "hostile", rows)
    folders = [pair_world.saved(kind, rows, tmp_path / kind) for kind in ("saf", "uarda", "sgr")]
    _, page = explain(folders, str(tmp_path / "hostile"), rows[0].key)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert Outline(page).headings[0] == "Where words look"
