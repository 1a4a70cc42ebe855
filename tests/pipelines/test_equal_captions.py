"""Equal captions of a split are embedded once, in the first shard that has them; nothing else changes, and a kill costs nothing."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from itm.config import parse_recipe
from itm.data.records import Caption, Record
from itm.data.shards import read_manifest
from itm.data.sidecar import open_store
from itm.teachers.identity import build_teacher
from pipelines.teaching import driver as stage
from pipelines.teaching import equal_captions
from pipelines.teaching.recompute import verify
from tests.support.small_teaching import SHUFFLED_TEXT, pack, recipe, scenes, score_here

pytest_plugins = ["tests.support.teaching_fixtures"]
TRUE_TEXT = SHUFFLED_TEXT["options"]["of"]


def digests_here(split_uri, shards, prepare):
    rows = [{"uri": f"{split_uri}/{s.name}", "name": s.name, "sha256": s.sha256} for s in shards]
    return equal_captions.Digests(prepare)(pa.Table.from_pylist(rows)).to_pylist()


@pytest.fixture
def embedded(here, monkeypatch):
    """The rows that reached the teacher, by call."""
    monkeypatch.setattr(equal_captions, "digests_of", digests_here)
    seen: list[int] = []
    from pipelines.teaching.actors import Score

    class Counting(Score):
        def _embed(self, payloads):
            seen.append(len(payloads))
            return super()._embed(payloads)

    monkeypatch.setattr("tests.support.small_teaching.Score", Counting)
    return seen


def records(texts: list[int], first: int = 0) -> list[Record]:
    """One image each, whose caption is the `n`-th of some different ones; -1 is a caption that the teacher cannot read."""
    teacher = build_teacher(recipe(Path(), None, TRUE_TEXT).teachers.text, "text")
    different = list({teacher.prepare(c): c for r in scenes(60) for c in r.captions}.values())
    image = scenes(1)[0].image
    said = [replace(different[n], id=f"c{first + k}") if n >= 0 else Caption(f"c{first + k}", "a dog") for k, n in enumerate(texts)]
    return [Record(f"k{first + k}", "train", [c], image, "png", None, {}) for k, c in enumerate(said)]


def wanted(here, how: str = "split", dtype: str = "fp16"):
    plain = recipe(here, None, TRUE_TEXT, max_reject_rate=0.5)
    return parse_recipe({**plain.model_dump(), "teachers": {"text": TRUE_TEXT, "equal_captions": how, "dtype": dtype}})


def held(here, uri: str) -> tuple[list[str], np.ndarray, list[str | None]]:
    rows = [open_store(uri).sidecar(s.name) for s in read_manifest(str(here / "train")).shards]
    return [c for r in rows for c in r.captions], np.concatenate([r.vectors for r in rows]), [p for r in rows for p in r.problems]


TEXTS = [0, 1, 0, 2, 1, 3, -1, 2, 0, 4, 3, 5]  # of four to a shard: six different ones


@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp32"])
def test_each_text_is_embedded_once_and_every_row_has_the_vector_it_had(here, embedded, dtype):
    pack(here, records(TEXTS))
    once = stage.teach(wanted(here, dtype=dtype))["text"]
    assert sum(embedded) == 6
    assert stage.flow_line(once).endswith("12 captions = 11 with a vector + 1 rejected; 6 different texts of 12 captions were embedded")
    found = held(here, once)
    assert not list(Path(once).glob("parts*"))
    assert verify(wanted(here, dtype=dtype), rows=8)[0].ok
    other = here / "other"
    pack(other, records(TEXTS))
    each = held(other, stage.teach(wanted(other, "shard", dtype))["text"])
    assert found[0] == each[0]
    assert found[2] == each[2]
    assert np.array_equal(found[1], each[1])


def test_bytes_are_the_same_whether_shards_came_one_by_one_or_at_once_and_old_ones_stay(here, embedded):
    pack(here, records(TEXTS[:8]))
    uri = Path(stage.teach(wanted(here))["text"])
    old = {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in uri.glob("*.arrow")}
    pack(here, records(TEXTS))
    embedded.clear()
    stage.teach(wanted(here))
    assert sum(embedded) == 2, "of the new shard, texts 4 and 5"
    assert {name: (f.stat().st_mtime_ns, f.read_bytes()) for name in old for f in [uri / name]} == old
    other = here / "other"
    pack(other, records(TEXTS))
    at_once = Path(stage.teach(wanted(other))["text"])
    assert {f.name: f.read_bytes() for f in uri.glob("*.*")} == {f.name: f.read_bytes() for f in at_once.glob("*.*")}


def test_what_was_scored_before_a_kill_is_not_scored_again(here, embedded, monkeypatch):
    pack(here, records(TEXTS))

    def dies(job, uri, todo, identity, **how):
        for number, written in enumerate(score_here(job, uri, todo, identity, **how)):
            yield written
            if number == 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage, "_score", dies)
        with pytest.raises(KeyboardInterrupt):
            stage.teach(wanted(here))
    assert sum(embedded) == 4
    assert not list(here.rglob("store.json"))
    embedded.clear()
    uri = stage.teach(wanted(here))["text"]
    assert sum(embedded) == 2
    counts = json.loads(Path(uri, "equal_captions.json").read_text())
    assert counts == {"captions": 12, "texts": 6}


def test_a_shard_that_is_not_that_of_the_manifest_is_named(here, embedded):
    pack(here, records(TEXTS))
    (here / "train" / "00001.tar").write_bytes((here / "train" / "00002.tar").read_bytes())
    with pytest.raises(ValueError, match=r"00001\.tar"):
        stage.teach(wanted(here))


@pytest.mark.e2e
def test_a_store_made_over_ray_has_the_bytes_of_one_made_here(tmp_path, monkeypatch, ray_local):
    monkeypatch.setattr(stage, "_tracked", lambda *a: nullcontext())
    for name in ("there", "here"):
        pack(tmp_path / name, records(TEXTS))
    there = Path(stage.teach(wanted(tmp_path / "there"))["text"])
    monkeypatch.setattr(stage, "_score", score_here)
    monkeypatch.setattr(equal_captions, "digests_of", digests_here)
    here = Path(stage.teach(wanted(tmp_path / "here"))["text"])
    made = {f.name: f.read_bytes() for f in there.glob("*.*")}
    assert made == {f.name: f.read_bytes() for f in here.glob("*.*")}
    assert {"00000.arrow", "00001.arrow", "00002.arrow", "store.json", "equal_captions.json"} <= made.keys()
