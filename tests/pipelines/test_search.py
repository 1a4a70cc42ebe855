from __future__ import annotations

import json
from pathlib import Path

import pytest

from itm.config import Part
from itm.data.manifest import Manifest, write_manifest
from itm.data.records import Caption, Record
from itm.data.shards import write_shard
from itm.retrieval import kept as index_of
from itm.tracking.registry import promote
from itm.tracking.runs import Tracker
from pipelines import search as stage
from pipelines.cli import stage_main
from tests.support.registry_world import matcher_folder, picture, register_matcher, tiny_matcher

COLOURS = ["red", "blue", "green", "red", "black", "blue"]
pytest_plugins = ["tests.support.registry_fixtures"]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Six discs in two shards, two captions each."""
    records = [
        Record(
            f"k{n}", "test", [Caption(f"k{n}-0", f"a {c} circle"), Caption(f"k{n}-1", f"a circle left {c}")], picture(c), "png", None, {}
        )
        for n, c in enumerate(COLOURS)
    ]
    uri = tmp_path / "shards" / "test"
    infos = [write_shard(str(uri / f"0000{s}.tar"), records[3 * s : 3 * s + 3]) for s in range(2)]
    write_manifest(str(uri), Manifest(split="test", source="discs", shards=infos))
    return str(uri)


SCAN = Part(kind="scan", options={"image": {"kind": "conv", "image_size": 32, "hidden": 16}, "text": {"kind": "gru", "width": 128}})


@pytest.mark.parametrize("part", [None, SCAN], ids=["vectors", "late interaction"])
def test_the_answers_are_those_of_scoring_every_pair(shards: str, tmp_path: Path, part: Part | None):
    matcher = tiny_matcher(2, part)
    folder = str(matcher_folder(tmp_path / "m", 2, part))
    images = matcher.encode_images(matcher.inputs.images([picture(c) for c in COLOURS]))
    texts = [text for c in COLOURS for text in (f"a {c} circle", f"a circle left {c}")]
    captions = matcher.encode_captions(matcher.inputs.captions(texts))
    scores = matcher.score(images, captions).detach()
    for _ in range(2):  # the second time from the cache
        found = stage.search("a red circle", model=folder, shards=shards, k=6)
        wanted = scores[:, 0].tolist()
        assert [h.score for h in found.hits] == pytest.approx(sorted(wanted, reverse=True), abs=1e-5)
        assert {h.key: h.score for h in found.hits} == pytest.approx({f"k{n}": value for n, value in enumerate(wanted)}, abs=1e-5)
        assert {h.key: Path(h.shard).name for h in found.hits} == {f"k{n}": f"0000{n // 3}.tar" for n in range(6)}
        assert next(h for h in found.hits if h.key == "k1").captions == ["a blue circle", "a circle left blue"]
    (tmp_path / "q.png").write_bytes(picture("blue"))
    back = stage.search(image=str(tmp_path / "q.png"), model=folder, shards=shards, k=12)
    assert [h.score for h in back.hits] == pytest.approx(sorted(scores[1].tolist(), reverse=True), abs=1e-5)
    assert all(len(h.captions) == 1 for h in back.hits)


def test_the_index_is_made_once_and_again_for_other_weights(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    whole = index_of.encode_split
    monkeypatch.setattr(index_of, "encode_split", lambda *args, **named: calls.append(args) or whole(*args, **named))
    index = tmp_path / "index"
    for seed in (1, 1, 2, 1):
        folder = matcher_folder(tmp_path / "m", seed)
        stage.search("a red circle", model=str(folder), shards=shards, index=str(index))
    assert len(calls) == 2
    assert len(list(index.iterdir())) == 2


def test_an_index_that_cannot_be_kept_is_warned_of_and_the_answers_are_the_same(shards: str, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    folder = str(matcher_folder(tmp_path / "m", 1))
    with pytest.warns(UserWarning, match=r"cannot write below .*file/index.*is not kept, and made again by the next search; --index"):
        found = stage.search("a red circle", model=folder, shards=shards, index=str(tmp_path / "file" / "index"))
    kept = stage.search("a red circle", model=folder, shards=shards, index=str(tmp_path / "index"))
    assert [(hit.key, hit.score) for hit in found.hits] == [(hit.key, hit.score) for hit in kept.hits]


def test_the_stage_prints_a_table_json_and_a_page(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = str(matcher_folder(tmp_path / "m"))
    page = tmp_path / "hits.html"
    where = ["--model", folder, "--shards", shards, "-k", "2"]
    assert stage_main("search", ["a red circle", *where, "--html", str(page)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3
    assert "6 images, 12 captions" in table[0]
    assert page.read_text().count("data:image/png;base64,") == 2
    assert stage_main("search", ["a red circle", *where, "--json"]) == 0
    assert [h["rank"] for h in json.loads(capsys.readouterr().out)["hits"]] == [1, 2]
    assert stage_main("search", where) == 2
    assert "either a text or --image" in capsys.readouterr().err
    assert stage_main("search", ["x", *where[:3], str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.e2e
def test_a_registered_model_searches_and_an_unknown_alias_is_told(
    registry: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with Tracker.start("tests", "run") as tracker:
        version = register_matcher(matcher_folder(tmp_path / "m"), "tiny", tracker.run_id, {})
    promote("tiny", version, "rsum", 1.0)
    assert len(stage.search("a red circle", model="models:/tiny@champion", shards=shards).hits) == 5
    assert stage_main("search", ["a red circle", "--model", "models:/tiny@chamption", "--shards", shards]) == 2
    assert "has no alias 'chamption'; it has candidate (version 1), champion (version 1)" in capsys.readouterr().err
