"""A store grows with its split and knows no temperature; its control is one flag; a constant or misnamed one is refused."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from itm.config import load_recipe, parse_recipe
from itm.data.records import Caption, Record
from itm.data.shards import read_manifest, write_manifest, write_shard
from itm.data.sidecar import open_store, read_sidecar
from itm.teachers.identity import build_teacher
from itm.teachers.shuffled import control_of
from itm.teachers.stores import store_for, stored_identity
from pipelines.cli import RECIPES, stage_main
from pipelines.teaching import driver as stage
from pipelines.teaching.actors import Score
from tests.support.small_teaching import SHUFFLED, SHUFFLED_TEXT, pack, recipe, samples, scenes, score_here

pytest_plugins = ["tests.support.teaching_fixtures"]

TRUE, TRUE_TEXT = SHUFFLED["options"]["of"], SHUFFLED_TEXT["options"]["of"]


def append(root: Path, records: list[Record]) -> None:
    """Photos that came later: one more shard of the split, the others as they are."""
    manifest = read_manifest(str(root / "train"))
    info = write_shard(str(root / "train" / f"{len(manifest.shards):05d}.tar"), records)
    write_manifest(str(root / "train"), manifest.model_copy(update={"shards": [*manifest.shards, info]}))


def contents(folder: str | Path) -> dict[str, tuple[int, bytes]]:
    return {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in Path(folder).glob("*.arrow")}


def test_only_the_rows_of_new_shards_are_scored_and_old_files_stay_untouched(here, monkeypatch):
    records = scenes(15)
    pack(here, records[:8])
    wanted = recipe(here, TRUE, TRUE_TEXT)
    stores = stage.teach(wanted)
    before = {modality: contents(uri) for modality, uri in stores.items()}
    append(here, records[8:])
    scored = []

    def counted(*given, **named):
        for written in score_here(*given, **named):
            scored.append(written.rows)
            yield written

    monkeypatch.setattr(stage, "_score", counted)
    assert stage.teach(wanted) == stores
    assert scored == [7, sum(len(r.captions) for r in records[8:])]
    for modality, uri in stores.items():
        now = contents(uri)
        assert {name: now[name] for name in before[modality]} == before[modality]
        assert sorted(now) == ["00000.arrow", "00001.arrow", "00002.arrow"]
        store_for(wanted, "train", modality).check((s.name, s.sha256) for s in read_manifest(str(here / "train")).shards)


def test_teachers_stand_side_by_side_and_each_is_found(here):
    pack(here, scenes(6))
    first, second = recipe(here, TRUE, TRUE_TEXT), recipe(here, {"kind": "statistics"})
    one = stage.teach(first)
    held = contents(one["image"])
    two = stage.teach(second)
    assert one["image"] != two["image"]
    assert contents(one["image"]) == held
    assert (store_for(first, "train", "image").uri, store_for(second, "train", "image").uri) == (one["image"], two["image"])


def test_another_temperature_reads_the_same_store_and_writes_nothing(here):
    pack(here, scenes(6))
    plain = recipe(here, TRUE, TRUE_TEXT)
    warm = [
        parse_recipe({**plain.model_dump(exclude_unset=True), "method": {"kind": "cusa", "options": {"csa": {"teacher": tau}}}})
        for tau in (0.05, 0.5)
    ]
    stores = stage.teach(warm[0])
    before = {f: f.stat().st_mtime_ns for f in here.rglob("*.*")}
    assert stage.teach(warm[1]) == stage.teach(plain) == stores
    assert {f: f.stat().st_mtime_ns for f in here.rglob("*.*")} == before
    for uri in stores.values():
        assert not any(word in json.dumps(open_store(uri).identity).lower() for word in ("temperature", "tau"))


# --- the control ----------------------------------------------------------------------------------------------------------------


def test_the_control_is_one_flag_and_training_finds_it_by_the_line_that_is_printed(here, capsys):
    pack(here, scenes(12))
    wanted = recipe(here, TRUE, TRUE_TEXT)
    (here / "r.json").write_text(wanted.model_dump_json(exclude_unset=True))
    assert stage_main("teach", ["-c", str(here / "r.json"), "--shuffled", "7"]) == 0
    said = capsys.readouterr().out
    lines = [shlex.split(line.removeprefix("train with it: "))[0] for line in said.splitlines() if line.startswith("train with it: ")]
    trained = load_recipe(here / "r.json", lines)
    assert trained.teachers == recipe(here, SHUFFLED, SHUFFLED_TEXT).teachers
    for modality in ("image", "text"):
        found = store_for(trained, "train", modality)
        assert found.identity["kind"] == "shuffled"
        assert f"{modality}: {found.uri}" in said
        assert Path(found.uri, "neighbours.html").read_text().startswith("<!doctype html>")
        assert f"{found.uri}/neighbours.html" in said
    assert stage.teach(recipe(here, SHUFFLED, SHUFFLED_TEXT))["image"] == store_for(trained, "train", "image").uri


def test_the_flag_spells_the_control_as_the_shipped_recipe_does():
    true, control = (load_recipe(RECIPES / f"demo-cusa{name}.yaml") for name in ("", "-shuffled"))
    assert control_of(true, 7).teachers == control.teachers
    with pytest.raises(ValueError, match=r"teachers\.image is the shuffled control already: leave --shuffled out"):
        control_of(control, 7)


# --- what is refused ------------------------------------------------------------------------------------------------------------


def test_a_teacher_that_gives_one_vector_for_all_is_refused_by_name(here):
    pack(here, scenes(9))
    path = here / "constant.npy"
    np.save(path, np.array({row.key: np.ones((1, 8), np.float32) for row in samples(here)}, dtype=object))
    wanted = recipe(here, {"kind": "cusa_npy", "options": {"path": str(path)}})
    for _ in range(2):  # also where all of its files are there already
        with pytest.raises(ValueError, match=r"'cusa_npy' gave one and the same vector for all 9 rows.*mend the teacher"):
            stage.teach(wanted)
    with pytest.raises(ValueError, match="no soft-label store"):
        store_for(wanted, "train", "image")


def test_a_store_under_the_name_of_another_teacher_is_refused(here):
    pack(here, scenes(6))
    first, second = recipe(here, TRUE), recipe(here, {"kind": "statistics"})
    one, two = (Path(stage.teach(wanted)["image"]) for wanted in (first, second))
    one.rename(one.with_name("aside"))
    two.rename(one)
    with pytest.raises(ValueError, match=rf"{one.name} bears the name of another teacher: it was scored by {two.name}"):
        store_for(first, "train", "image")
    assert stage.teach(first)["image"] == str(one)
    assert store_for(first, "train", "image").teacher == one.name


def test_a_file_of_another_teacher_inside_a_store_is_refused_and_made_again(here):
    pack(here, scenes(6))
    wanted = recipe(here, TRUE)
    one, two = (Path(stage.teach(w)["image"]) for w in (wanted, recipe(here, {"kind": "statistics"})))
    whole = (one / "00001.arrow").read_bytes()
    (one / "00001.arrow").write_bytes((two / "00001.arrow").read_bytes())
    with pytest.raises(ValueError, match=rf"00001\.arrow was scored by {two.name}, expected {one.name}"):
        store_for(wanted, "train", "image").sidecar("00001.tar")
    stage.teach(wanted)
    assert (one / "00001.arrow").read_bytes() == whole


def test_a_store_of_other_captions_is_refused(here):
    records = scenes(6)
    pack(here, records)
    wanted = recipe(here, None, TRUE_TEXT)
    stage.teach(wanted)
    records[1] = replace(records[1], captions=[*records[1].captions, *records[2].captions[:1]])
    manifest = pack(here, records)
    with pytest.raises(ValueError, match=r"00000\.arrow was scored from another version of 00000\.tar: run `itm teach`"):
        store_for(wanted, "train", "text").check((s.name, s.sha256) for s in manifest.shards)


# --- equal captions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("different", "embedded"), [(2, 2), (8, 8), (9, 16)])
def test_equal_captions_are_embedded_once_where_most_are_repeats(here, different, embedded):
    teacher = build_teacher(recipe(here, None, TRUE_TEXT).teachers.text, "text")
    source = list({teacher.prepare(c): c for r in scenes(30) for c in r.captions}.values())[:different]
    said = [replace(source[k % different], id=f"c{k}") for k in range(16)]
    manifest = pack(here, [Record(f"k{k}", "train", [c], scenes(1)[0].image, "png", None, {}) for k, c in enumerate(said)], per_shard=16)
    job = stage.Job.of(recipe(here, None, TRUE_TEXT), "train", "text", recipe(here, None, TRUE_TEXT).teachers.text)
    rows = []

    class Counting(Score):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            embed = self.teacher.embed
            self.teacher.embed = lambda payloads: rows.append(len(payloads)) or embed(payloads)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.support.small_teaching.Score", Counting)
        list(score_here(job, str(here / "store"), manifest.shards, stored_identity(teacher, "fp16"), prepare=teacher.prepare))
    assert sum(rows) == embedded
    stored = read_sidecar(str(here / "store" / "00000.arrow"))
    live = teacher([Caption(c.id, c.text, c.meta) for c in said])
    assert np.abs(stored.vectors - live / np.linalg.norm(live, axis=1, keepdims=True)).max() < 1e-3
