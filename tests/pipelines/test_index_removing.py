"""Images are taken out of an index by their keys: no search finds them, nothing is encoded, and what is done later keeps them out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from itm.data.manifest import Manifest, write_manifest
from itm.data.shards import read_manifest, write_shard
from itm.retrieval import approximate
from itm.retrieval.audit import duplicates
from itm.retrieval.engine import Engine, Question
from itm.retrieval.index import Index
from pipelines.cli import stage_main
from pipelines.indexing.building import Wanted, build
from pipelines.indexing.removing import remove
from pipelines.indexing.settings import Chosen, settle
from tests.support.disc_index import COLOURS, SCAN, disc, write_discs
from tests.support.registry_world import matcher_folder, picture, tiny_matcher

QUESTIONS = [Question("a red circle", k=9), Question(image=picture("red"), find="captions", k=99), Question(image=picture("red"), k=9)]


def found(matcher, uri: Path | str) -> list[dict[str, float]]:
    answers = Engine(matcher, Index.open(str(uri), matcher), "cpu").answer(QUESTIONS)
    return [{hit.key + "".join(hit.caption_ids if n == 1 else []): hit.score for hit in own.hits} for n, own in enumerate(answers)]


def listed(folder: Path, *keys: str) -> str:
    (folder / "keys.txt").write_text("".join(f"{key}\n" for key in keys))
    return str(folder / "keys.txt")


def test_the_command_hides_images_and_says_how_many_and_what_comes_later_keeps_them_out(tmp_path, capsys):
    folder, split, output = str(matcher_folder(tmp_path / "m", 2)), write_discs(tmp_path / "test", per_shard=2), tmp_path / "index"
    asked = ["--model", folder, "--output", str(output)]
    assert stage_main("index", [*asked, "--shards", split]) == 0
    matcher = tiny_matcher(2)
    before = found(matcher, output)
    vectors = {p: p.stat().st_mtime_ns for p in output.rglob("*.arrow")}
    assert json.loads((output / "index.json").read_text())["format"] == 1
    capsys.readouterr()
    assert stage_main("index", [*asked, "--remove", listed(tmp_path, "k0", "k3")]) == 0
    assert capsys.readouterr().out == f"6 images = 4 indexed + 0 rejected + 2 removed, 8 captions in 3 shards; {output}\n"
    left = [{key: score for key, score in own.items() if key[:2] not in ("k0", "k3")} for own in before]
    for own, wanted in zip(found(matcher, output), left, strict=True):
        assert own == pytest.approx(wanted, abs=1e-6)
    assert [len(own) for own in left] == [4, 8, 4]
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*.arrow")} == vectors
    assert json.loads((output / "index.json").read_text())["format"] == 2, "an earlier version would find them"
    index = Index.open(str(output), matcher)
    assert len(index) == 4
    assert index.caption_count == 8
    with pytest.raises(ValueError, match="image 'k3' was removed from the index"):
        index.sample("k3")
    assert stage_main("index", [*asked, "--remove", listed(tmp_path, "k3", "k5")]) == 0
    manifest = read_manifest(split)
    rewritten = write_shard(f"{split}/00002.tar", [disc(5, "blue"), disc(6, "white")])
    write_manifest(split, manifest.model_copy(update={"shards": [*manifest.shards[:2], rewritten]}))
    capsys.readouterr()
    assert stage_main("index", [*asked, "--add"]) == 0
    assert capsys.readouterr().out.startswith("6 images = 3 indexed + 0 rejected + 3 removed, 6 captions in 3 shards")
    assert set(found(matcher, output)[0]) == {"k1", "k2", "k6"}


def test_every_copy_of_a_removed_image_is_hidden(tmp_path):
    matcher, split, output = tiny_matcher(2), tmp_path / "test", str(tmp_path / "index")
    rows = [
        replace(disc(n, colour), meta={"image_id": name}) for n, (colour, name) in enumerate([("red", "a"), ("blue", "b"), ("red", "a")])
    ]
    write_manifest(str(split), Manifest(split="test", source="discs", shards=[write_shard(str(split / "00000.tar"), rows)]))
    build(Wanted(matcher, (str(split),), output, device="cpu"))
    assert set(found(matcher, output)[0]) == {"k0", "k1"}, "k2 shows the image of k0"
    remove(output, matcher, listed(tmp_path, "k2"))
    assert set(found(matcher, output)[0]) == {"k1"}
    index = Index.open(output, matcher)
    assert index.caption_count == 2
    with pytest.raises(ValueError, match="image 'k0' was removed from the index"):
        index.row_of("k0")
    assert duplicates(index, 0.01).images == 1


def test_unknown_keys_are_refused_before_anything_is_noted(tmp_path):
    matcher, output = tiny_matcher(2), tmp_path / "index"
    build(Wanted(matcher, (write_discs(tmp_path / "test"),), str(output), device="cpu"))
    before = (output / "index.json").read_bytes()
    with pytest.raises(ValueError, match=r"keys.txt: the index .* holds no image 'x' \(1 of 2 keys are unknown\); keys look like 'k0'"):
        remove(str(output), matcher, listed(tmp_path, "k1", "x"))
    with pytest.raises(ValueError, match=r"--remove .*away.txt: there is no such file"):
        remove(str(output), matcher, str(tmp_path / "away.txt"))
    with pytest.raises(ValueError, match=r"keys.txt names no image: it holds one key a line"):
        remove(str(output), matcher, listed(tmp_path, ""))
    assert (output / "index.json").read_bytes() == before


def test_first_stages_that_were_set_up_before_propose_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(approximate, "LEAST_ROWS", 4)
    pytest.importorskip("faiss", reason="NOT TESTED: faiss is not installed (extra `faiss`)")
    matcher = tiny_matcher(2)
    colours = COLOURS * 5
    wanted = Wanted(matcher, (write_discs(tmp_path / "test", colours, 10),), str(tmp_path / "index"), device="cpu")
    settle(wanted, build(wanted), Chosen(recall=0.5, sample=10))
    order = [hit.key for hit in Engine(matcher, Index.open(wanted.output, matcher), "cpu").answer([Question("a red circle", k=30)])[0].hits]
    remove(wanted.output, matcher, listed(tmp_path, *order[:25]))
    engine = Engine(matcher, Index.open(wanted.output, matcher), "cpu")
    question = Question("a red circle", k=3)
    assert engine.first.quickly(question)
    assert [hit.key for hit in engine.answer([question])[0].hits] == order[25:28]


def test_a_screened_index_stays_screened(tmp_path):
    matcher = tiny_matcher(2, SCAN)
    wanted = Wanted(matcher, (write_discs(tmp_path / "test"),), str(tmp_path / "index"), device="cpu")
    settle(wanted, build(wanted), Chosen("centroids", loss=0.5, sample=99))
    remove(wanted.output, matcher, listed(tmp_path, "k2"))
    index = Index.open(wanted.output, matcher)
    assert index.settings["screen"]["by"] == "centroids"
    (answer,) = Engine(matcher, index, "cpu").answer([Question("a red circle", k=9)])
    assert {hit.key for hit in answer.hits} == {"k0", "k1", "k3", "k4", "k5"}
    build(Wanted(matcher, (), wanted.output, device="cpu", add=True))
    assert Index.open(wanted.output, matcher).settings == index.settings, "nothing was added, so what was chosen counts"
