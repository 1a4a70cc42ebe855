"""The teach stage: rows stay in step with the shards, damage is named, a kill costs nothing, the shuffled control is what it claims."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from itm.config import Part
from itm.data.patience import ASKED, asked
from itm.data.records import Caption, Record
from itm.data.shards import read_manifest
from itm.data.sidecar import find_store, open_store, read_sidecar
from itm.teachers.identity import build_teacher, choice_of
from itm.teachers.image import StatisticsTeacher
from itm.teachers.stores import store_for, stored_identity
from pipelines.on_ray.shard_actors import through_actors
from pipelines.teaching import driver as stage
from tests.support.small_teaching import SHUFFLED, SHUFFLED_TEXT, pack, recipe, samples, scenes, score_here

pytest_plugins = ["tests.support.teaching_fixtures"]


def files_of(folder: str | Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


def test_the_share_that_actors_worked_counts_from_the_first_shard_of_each():
    first, second = stage.Written(4, "a", 10.0, 12.0), stage.Written(4, "a", 13.0, 14.0)
    assert stage.busy([first, second]) == {"actor_busy": 3 / 4}
    assert stage.busy([first, second, stage.Written(4, "b", 11.0, 14.0)]) == {"actor_busy": 6 / 7}
    assert stage.busy([]) == stage.busy([stage.Written(3)]) == {}


def test_rows_follow_the_tar_and_carry_the_live_vectors(here):
    pack(here, scenes(10))
    stores = stage.teach(recipe(here, {"kind": "statistics"}, {"kind": "scenes_text", "options": {"world": "tiny"}}))
    rows = samples(here)
    sidecars = {m: [open_store(uri).sidecar(f"{n:05d}.tar") for n in range(3)] for m, uri in stores.items()}
    assert [k for s in sidecars["image"] for k in s.keys] == [r.key for r in rows]
    names = [(k, c) for s in sidecars["text"] for k, c in zip(s.keys, s.captions, strict=True)]
    assert names == [(r.key, c.id) for r in rows for c in r.captions]
    live = StatisticsTeacher()(rows)
    live /= np.linalg.norm(live, axis=1, keepdims=True)
    assert np.abs(np.concatenate([s.vectors for s in sidecars["image"]]) - live).max() < 3e-4


def test_running_again_writes_nothing(here):
    pack(here, scenes(6))
    wanted = recipe(here, {"kind": "statistics"})
    uri = stage.teach(wanted)["image"]
    before = {f: f.stat().st_mtime_ns for f in here.rglob("*.*")}
    assert stage.teach(wanted)["image"] == uri
    assert {f: f.stat().st_mtime_ns for f in here.rglob("*.*")} == before


def test_only_missing_damaged_or_outdated_sidecars_are_made_again(here):
    records = scenes(12)
    pack(here, records)
    wanted = recipe(here, {"kind": "statistics"})
    uri = Path(stage.teach(wanted)["image"])
    whole = files_of(uri)
    kept = os.stat(uri / "00000.arrow").st_mtime_ns
    (uri / "00001.arrow").unlink()
    (uri / "00002.arrow").write_bytes(whole["00002.arrow"][:100])
    stage.teach(wanted)
    assert files_of(uri) == whole
    pack(here, records[:8] + records[9:])  # the last shard has changed
    stage.teach(wanted)
    assert os.stat(uri / "00000.arrow").st_mtime_ns == kept
    assert read_sidecar(str(uri / "00002.arrow")).keys == [r.key for r in records[9:]]


def test_a_corrupt_image_keeps_its_row_and_is_quarantined(here):
    records = scenes(8)
    bad = records[5]
    records[5] = Record(bad.key, bad.split, bad.captions, b"\x89PNG not an image", "png", None, bad.meta)
    pack(here, records)
    uri = stage.teach(recipe(here, {"kind": "statistics"}, max_reject_rate=0.2))["image"]
    rows = open_store(uri).sidecar("00001.tar")
    assert rows.keys == [r.key for r in records[4:]]
    assert rows.ok.tolist() == [True, False, True, True]
    (line,) = (Path(uri) / "quarantine.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["key"], row["shard"], row["stage"]) == (bad.key, "00001.tar", "teach")
    assert "cannot decode" in row["reason"]


def test_a_caption_that_cannot_be_scored_keeps_its_row_between_the_others(here):
    records = scenes(3)
    odd = [Caption("x", "a dog"), *records[1].captions]
    records[1] = Record(records[1].key, "train", odd, records[1].image, "png", None, records[1].meta)
    pack(here, records)
    uri = stage.teach(recipe(here, None, {"kind": "scenes_text", "options": {"world": "tiny"}}, max_reject_rate=0.5))["text"]
    rows = open_store(uri).sidecar("00000.tar")
    assert [c == "x" for c in rows.captions] == (~rows.ok).tolist()
    assert "caption x: " in (Path(uri) / "quarantine.jsonl").read_text()


def test_too_many_rejected_rows_fail_before_the_store_counts_as_done(here):
    pack(here, [Record(f"k{n}", "train", [Caption(f"{n}", "a dog")], b"no image", "jpg") for n in range(3)])
    wanted = recipe(here, {"kind": "statistics"})
    with pytest.raises(ValueError, match=r"3 of 3 rows.*max_reject_rate=0\.01.*cannot decode"):
        stage.teach(wanted)
    with pytest.raises(ValueError, match=r"no soft-label store of the image teacher 'statistics'.*itm teach"):
        store_for(wanted, "train", "image")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda v: v[:, 0], r"gave \(3,\) for 3 rows of width 1536"),
        (lambda v: v * 0, r"00000\.arrow: row 0, sample 'scene-train-000000'.*zero norm"),
        (lambda v: v * np.nan, r"00000\.arrow: row 0, sample 'scene-train-000000'.*not finite"),
    ],
)
def test_unusable_teacher_vectors_stop_the_stage_and_leave_no_sidecar(here, monkeypatch, spoil, said):
    pack(here, scenes(4))
    embed = StatisticsTeacher.embed
    monkeypatch.setattr(StatisticsTeacher, "embed", lambda self, payloads: spoil(embed(self, payloads)))
    with pytest.raises(ValueError, match=said):
        stage.teach(recipe(here, {"kind": "statistics"}))
    assert not list(here.rglob("*.arrow"))
    assert not list(here.rglob("store.json"))


def test_a_worker_with_other_weights_is_refused(here):
    manifest = pack(here, scenes(2))
    job = stage.Job.of(recipe(here, {"kind": "statistics"}), "train", "image", Part(kind="statistics"))
    teacher = build_teacher(job.part, "image")
    identity = stored_identity(teacher, "fp16") | {"revision": "other"}
    with pytest.raises(ValueError, match="other weights of 'hsv-pyramid'"):
        list(score_here(job, str(here / "store"), manifest.shards, identity, prepare=teacher.prepare))


def test_a_shard_that_has_gone_is_named(here):
    pack(here, scenes(4))
    (here / "train" / "00000.tar").unlink()
    with pytest.raises(ValueError, match=r"00000\.tar"):
        stage.teach(recipe(here, {"kind": "statistics"}))


def test_a_recipe_without_teachers_or_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"names no teacher: set teachers\.image"):
        stage.teach(recipe(tmp_path))
    with pytest.raises(ValueError, match="itm pack"):
        stage.teach(recipe(tmp_path, {"kind": "statistics"}))


def test_a_store_is_found_by_kind_options_and_type_alone(here, monkeypatch):
    pack(here, scenes(4))
    wanted = recipe(here, {"kind": "statistics", "options": {"size": 32}})
    uri = stage.teach(wanted)["image"]
    monkeypatch.setattr(stage, "build_teacher", None)
    assert store_for(wanted, "train", "image").uri == uri
    with pytest.raises(ValueError, match="itm teach"):
        store_for(recipe(here, {"kind": "statistics"}), "train", "image")


# --- the shuffled control -------------------------------------------------------------------------------------------------------


def donors(base, shuffled):
    """Row -> the base row that it is nearest to."""
    return (shuffled @ base.T).argmax(1)


def vectors_of(here, part, modality):
    store = find_store(str(here / "train" / "teachers"), choice_of(Part.model_validate(part), modality, "fp16"))
    return np.concatenate([store.sidecar(s.name).vectors.astype(np.float32) for s in read_manifest(str(here / "train")).shards])


def test_the_shuffled_control_gives_every_image_the_vector_of_another(here):
    pack(here, scenes(11))
    base = {"kind": "statistics", "options": {"size": 64}}
    part = {"kind": "shuffled", "options": {"of": base, "seed": 7}}
    stage.teach(recipe(here, part))
    true, shuffled = vectors_of(here, base, "image"), vectors_of(here, part, "image")
    assert (true @ true.T - 2 * np.eye(len(true))).max() < 0.9999, "the images of this world must differ"
    permutation = donors(true, shuffled)
    assert sorted(permutation) == list(range(11))
    assert not (permutation == np.arange(11)).any()
    assert np.abs(shuffled - true[permutation]).max() < 1e-3
    stage.teach(recipe(here, part | {"options": {"of": base, "seed": 8}}))
    other = vectors_of(here, part | {"options": {"of": base, "seed": 8}}, "image")
    assert (donors(true, other) != permutation).any()


def test_both_modalities_of_the_shuffled_control_are_wrong_in_the_same_way(here):
    pack(here, scenes(11))
    stage.teach(recipe(here, SHUFFLED, SHUFFLED_TEXT))
    rows = samples(here)
    true_i, wrong_i = vectors_of(here, SHUFFLED["options"]["of"], "image"), vectors_of(here, SHUFFLED, "image")
    true_t, wrong_t = vectors_of(here, SHUFFLED_TEXT["options"]["of"], "text"), vectors_of(here, SHUFFLED_TEXT, "text")
    first = np.cumsum([0, *(len(r.captions) for r in rows)])
    agreeing = []
    for i, row in enumerate(rows):
        fits = lambda j, i=i, row=row: (
            j != i
            and np.abs(wrong_i[i] - true_i[j]).max() < 1e-3
            and all(
                np.abs(wrong_t[first[i] + k] - true_t[first[j] + k % len(rows[j].captions)]).max() < 1e-3 for k in range(len(row.captions))
            )
        )
        agreeing.append([j for j in range(len(rows)) if fits(j)])
    assert all(agreeing), "one image explains both modalities of every row"


def test_a_shuffled_part_names_its_wrong_option(here):
    pack(here, scenes(4))
    with pytest.raises(ValueError, match=r"'shuffled', option of: .*options: of, seed"):
        stage.teach(recipe(here, {"kind": "shuffled", "options": {"seed": 1}}))


def test_one_image_cannot_be_shuffled(here):
    pack(here, scenes(1))
    with pytest.raises(ValueError, match="at least two images"):
        stage.teach(recipe(here, SHUFFLED))


# --- the real thing -------------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_killed_run_ends_with_the_same_bytes_and_recomputes_nothing(tmp_path, monkeypatch, ray_local):
    monkeypatch.setattr(stage, "_tracked", lambda *a: nullcontext())
    pack(tmp_path / "data", scenes(60), per_shard=2)
    teacher = {"kind": "statistics", "options": {"size": 256}}
    (tmp_path / "r.json").write_text(
        json.dumps({"name": "t", "model": {"kind": "dual"}, "data": {"root": str(tmp_path / "data")}, "teachers": {"image": teacher}})
    )
    root = tmp_path / "data" / "train" / "teachers"
    killed = subprocess.Popen(
        [sys.executable, "-m", "pipelines.teach", "-c", str(tmp_path / "r.json")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(root.rglob("*.arrow")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    time.sleep(3)  # orphaned workers finish or die
    left = {f: os.stat(f).st_ino for f in root.rglob("*.arrow")}
    assert 0 < len(left) < 30, "killed half-way"
    assert not list(root.rglob("store.json"))

    stage.teach(recipe(tmp_path / "data", teacher))
    assert {f: os.stat(f).st_ino for f in left} == left, "what was done is not done again"
    shutil.copytree(tmp_path / "data", tmp_path / "again", ignore=shutil.ignore_patterns("teachers"))
    monkeypatch.setattr(stage, "_score", score_here)
    stage.teach(recipe(tmp_path / "again", teacher))
    made = {name: data for name, data in files_of(root).items() if ".tmp-" not in name}
    assert made == files_of(tmp_path / "again" / "train" / "teachers")


@pytest.mark.e2e
def test_a_store_logs_one_run_with_its_identity_and_a_second_teach_logs_none(tmp_path, monkeypatch, ray_local):
    from itm.tracking.runs import client

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    pack(tmp_path / "data", scenes(12))
    wanted = recipe(tmp_path / "data", {"kind": "statistics"})
    stage.teach(wanted)
    stage.teach(wanted)
    door = client()
    (run,) = door.search_runs([door.get_experiment_by_name("itm").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["teacher.kind"] == "statistics"
    assert (run.data.metrics["rows"], run.data.metrics["shards"], run.data.metrics["rejected"]) == (12, 3, 0)
    assert run.data.metrics["rows_per_second"] > 0
    assert 0 < run.data.metrics["actor_busy"] <= 1


@pytest.mark.e2e
def test_an_error_in_a_worker_reaches_the_user_as_one_line(tmp_path, monkeypatch, ray_local):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    pack(tmp_path, scenes(4))
    wanted = recipe(tmp_path, {"kind": "statistics"})
    real = stage.stored_identity
    monkeypatch.setattr(stage, "stored_identity", lambda teacher, dtype: real(teacher, dtype) | {"revision": "of the driver"})
    with pytest.raises(ValueError, match="other weights of 'hsv-pyramid'"):
        stage.teach(wanted)


@pytest.mark.e2e
def test_what_tasks_and_actors_ask_a_store_again_is_counted_in_the_driver(ray_local):
    def ask(failures):
        left = [ConnectionError("reset")] * failures

        def once():
            if left:
                raise left.pop()

        asked(once, "s3://there/x", "s3://there")

    def prepare(rows):
        ask(2)
        return rows

    class Actor:
        def __init__(self, failures):
            ask(failures)

        def __call__(self, rows):
            ask(1)
            return rows

    again, waited = ASKED.again, ASKED.waited
    rows = [{"row": n, "error": None} for n in range(3)]
    made = list(through_actors(rows, prepare, Actor, lambda device: (4,), None))
    assert sorted(row["row"] for row in made) == [0, 1, 2] and set(made[0]) == {"row"}
    assert ASKED.again - again == 3 * 2 + 4 + 3 * 1
    assert ASKED.waited > waited
