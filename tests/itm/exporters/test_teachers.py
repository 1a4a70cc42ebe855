"""Exported stores say what the stores say, in forms that other code reads."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from itm.data import sidecar as s
from itm.exporters.teachers import export_stores, finished_stores
from itm.teachers.cusa_npy import CusaNpyTeacher
from pipelines.cli import stage_main
from pipelines.teaching import driver as stage
from tests.support.small_teaching import pack, recipe, samples, scenes

pytest_plugins = ["tests.support.teaching_fixtures"]
IMAGE, TEXT = ({"kind": f"scenes_{modality}", "options": {"world": "tiny"}} for modality in ("image", "text"))


@pytest.fixture
def taught(here):
    """Nine scenes in three shards; the third vector of an image and the second of a caption are missing."""
    pack(here, scenes(9))
    stores = stage.teach(recipe(here, IMAGE, TEXT))
    for uri, row in ((stores["image"], 2), (stores["text"], 1)):
        rows = s.open_store(uri).sidecar("00000.tar")
        problems = [("unreadable" if k == row else None) for k in range(len(rows.keys))]
        s.write_sidecar(rows.uri, rows.header, rows.keys, np.array(rows.vectors, np.float32), rows.captions, problems)
    return here


def stored(root, modality):
    """(key, caption or key) -> vector of every row that has one, read from the sidecars."""
    (store,) = (x for x in finished_stores(str(root / "train" / "teachers")) if x.modality == modality)
    found = {}
    for name in sorted(store.shards):
        rows = store.sidecar(name)
        found |= {(k, c): v for k, c, v, ok in zip(rows.keys, rows.captions or rows.keys, rows.vectors, rows.ok, strict=True) if ok}
    return found


def export(root, form, output, *more):
    assert stage_main("export", ["teachers", str(root / "train"), "--to", form, "-o", str(output), *more]) == 0


def test_a_parquet_table_has_every_vector_with_what_it_belongs_to(taught, tmp_path, capsys):
    export(taught, "parquet", tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    texts = {(x.key, c.id): c.text for x in samples(taught) for c in x.captions}
    for modality in ("image", "text"):
        (folder,) = (tmp_path / "out").glob(f"{modality}-*")
        table, want = pq.read_table(folder), stored(taught, modality)
        labels = table["caption"] if modality == "text" else table["key"]
        got = dict(zip(zip(table["key"].to_pylist(), labels.to_pylist(), strict=True), table["vector"].to_pylist(), strict=True))
        assert got.keys() == want.keys()
        assert all(np.array_equal(np.float32(got[row]), np.float32(want[row])) for row in want)
        assert f"{folder}: {len(want)} vectors, 1 rows without one" in said
        if modality == "text":
            assert table["text"].to_pylist() == [texts[row] for row in got]


def test_the_npy_form_is_what_cusas_loader_and_our_own_teacher_read(taught, tmp_path):
    export(taught, "npy", tmp_path)
    (images,), (texts,) = tmp_path.glob("train_image_*.npy"), tmp_path.glob("train_text_*.npy")
    held = np.load(images, allow_pickle=True).item()
    want = stored(taught, "image")
    assert {key: value.shape[0] for key, value in held.items()} == {key: 1 for key, _ in want}
    assert all(np.array_equal(held[key][0], np.float32(vector)) for (key, _), vector in want.items())
    teacher = CusaNpyTeacher(str(images), "image")
    kept = [x for x in samples(taught) if x.key in held]
    assert np.array_equal(teacher.embed([teacher.prepare(x) for x in kept]), np.stack([held[x.key][0] for x in kept]))
    teacher = CusaNpyTeacher(str(texts), "text")
    caption = samples(taught)[-1].captions[0]
    assert np.array_equal(
        teacher.embed([teacher.prepare(caption)])[0], np.float32(stored(taught, "text")[samples(taught)[-1].key, caption.id])
    )


def test_a_tar_has_the_samples_as_they_were_and_their_vectors_beside_them(taught, tmp_path):
    export(taught, "webdataset", tmp_path / "beside" / "train")
    images, texts = stored(taught, "image"), stored(taught, "text")
    tars = sorted(map(str, (tmp_path / "beside" / "train").glob("*.tar")))
    read = list(wds.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert [(x["__key__"], x["png"]) for x in read] == [(x.key, x.image) for x in samples(taught)]
    for sample in read:
        key = sample["__key__"]
        vector, rows = (np.load(io.BytesIO(sample[f"teacher_{name}.npy"])) for name in ("image", "text"))
        assert np.array_equal(vector, images.get((key, key), np.zeros_like(vector)))
        ids = [caption["id"] for caption in json.loads(sample["json"])["captions"]]
        assert np.array_equal(rows, [texts.get((key, name), np.zeros(rows.shape[1])) for name in ids])
    assert stage_main("inspect", [str(tmp_path / "beside" / "train")]) == 0


@pytest.mark.parametrize("form", ["parquet", "npy", "webdataset"])
def test_the_same_store_gives_the_same_bytes(form, taught, tmp_path):
    for name in ("a", "b"):
        export(taught, form, tmp_path / name)
    first, second = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in ("a", "b"))
    assert first == second
    assert first


def test_int8_and_half_floats_come_out_as_numbers(here, tmp_path):
    pack(here, scenes(5))
    wanted = recipe(here, IMAGE)
    stage.teach(wanted.model_copy(update={"teachers": wanted.teachers.model_copy(update={"dtype": "int8"})}))
    (store,) = finished_stores(str(here / "train" / "teachers"))
    (done,) = export_stores("parquet", [store], str(here / "train"), str(tmp_path), "fp16")
    table = pq.read_table(done.uri)
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-2)
    assert np.allclose(vectors, np.concatenate([store.sidecar(name).vectors for name in sorted(store.shards)]), atol=1e-3)


def test_images_of_one_id_are_one_entry_of_npy_and_different_ones_are_refused(here, tmp_path):
    first, second, third = scenes(3)
    same = [replace(record, meta={**record.meta, "image_id": 7}) for record in (first, replace(first, key="again"))]
    pack(here, [*same, second])
    stage.teach(recipe(here, IMAGE))
    (done,) = export_stores("npy", finished_stores(str(here / "train" / "teachers")), str(here / "train"), str(tmp_path))
    assert sorted(map(str, np.load(done.uri, allow_pickle=True).item())) == ["7", second.key]
    pack(here, [same[0], replace(third, meta={**third.meta, "image_id": 7}), second])
    stage.teach(recipe(here, IMAGE))
    with pytest.raises(ValueError, match=r"00000\.tar: two images of the id 7 have different vectors.*export parquet"):
        export_stores("npy", finished_stores(str(here / "train" / "teachers")), str(here / "train"), str(tmp_path / "other"))
    assert not list((tmp_path / "other").glob("*"))


def test_a_store_whose_rows_are_of_other_samples_is_not_exported(taught, tmp_path):
    (store,) = (x for x in finished_stores(str(taught / "train" / "teachers")) if x.modality == "image")
    rows = store.sidecar("00001.tar")
    s.write_sidecar(rows.uri, rows.header, [*rows.keys[1:], rows.keys[0]], np.array(rows.vectors, np.float32))
    with pytest.raises(
        ValueError, match=rf"00001\.arrow: the row of '{rows.keys[1]}' stands where sample '{rows.keys[0]}' of 00001\.tar is"
    ):
        export_stores("parquet", [store], str(taught / "train"), str(tmp_path))


def test_what_cannot_be_exported_is_named(taught, tmp_path, capsys):
    split = str(taught / "train")
    for arguments, said in (
        (["--to", "parquet", "--teacher", "nobody"], "no finished soft-label store at"),
        (["--to", "onnx"], "`itm export teachers` writes parquet or npy or webdataset, not onnx"),
        (["--to", "parquet", "--stores", str(tmp_path)], "no finished soft-label store below"),
    ):
        assert stage_main("export", ["teachers", split, "-o", str(tmp_path / "out"), *arguments]) == 2
        assert said in capsys.readouterr().err
    assert stage_main("export", ["teachers", split, "--to", "webdataset", "-o", split]) == 2
    assert "must be another folder" in capsys.readouterr().err
    pack(taught, scenes(10))
    assert stage_main("export", ["teachers", split, "--to", "npy", "-o", str(tmp_path / "out")]) == 2
    assert "scored from another version of 00002.tar" in capsys.readouterr().err
