"""The authors' stored teacher vectors: read without running code, found by image id or caption, refused where the original went wrong."""

from __future__ import annotations

import os
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from itm.config import Part
from itm.data.records import Caption
from itm.data.shards import Sample
from itm.data.sidecar import open_store
from itm.teachers.cusa_npy import CusaNpyTeacher, read_dict
from itm.teachers.identity import build_teacher
from pipelines.teaching import driver as stage
from tests.support.small_teaching import pack, recipe, samples, scenes, score_here


def stored(path: Path, content: Any) -> str:
    np.save(path, np.array(content, dtype=object))
    return str(path)


def sample(key: str, **meta: Any) -> Sample:
    return Sample(key, None, None, [], meta)


def vectors(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["<f4", "<f2", ">f8"])
def test_the_dict_is_what_numpy_reads_with_pickle_allowed(tmp_path: Path, protocol: int, dtype: str):
    content = {"a.jpg": vectors(1, 4).astype(dtype), 7: np.asfortranarray(vectors(3, 2).astype(dtype)), "c": vectors(5).astype(dtype)}
    path = tmp_path / "a.npy"
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(content, dtype=object), stream, protocol=protocol)
    want, got = np.load(path, allow_pickle=True).item(), read_dict(path)
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[key], want[key]) and got[key].itemsize == want[key].itemsize for key in want)


def test_rows_are_found_by_image_id_and_captions_as_they_are_or_cleaned(tmp_path: Path):
    rows = vectors(3, 1, 6)
    one = stored(tmp_path / "train_unicom.npy", {"x.jpg": rows[0], 17: rows[1]})
    two = stored(tmp_path / "val_unicom.npy", {"y": rows[2]})
    images = build_teacher(Part(kind="cusa_npy", options={"path": [one, two]}), "image")
    got = images([sample("k0", image_id=17), sample("y"), sample("k1", image_id="x.jpg")])
    assert np.array_equal(got, rows[[1, 2, 0], 0])
    said = build_teacher(
        Part(kind="cusa_npy", options={"path": stored(tmp_path / "t.npy", {"A dog.": rows[0, 0], "a cat": rows[1, 0]})}), "text"
    )
    assert np.array_equal(said([Caption("1", "A dog."), Caption("2", "A  cat!")]), rows[:2, 0])
    assert pickle.loads(pickle.dumps(images.prepare))(sample("y")) == b"y"
    with pytest.raises(ValueError, match=r"sample 'z': the stored vectors have no key 'z'; give the file of this split"):
        images([sample("z")])


def test_a_sample_that_is_named_by_a_number_finds_the_photo_of_that_number_and_no_other(tmp_path: Path):
    rows = vectors(4, 1, 6)
    names = ["COCO_val2014_000000391895.jpg", "1000092795.jpg", "a_7.jpg", "b_07.jpg"]
    teacher = CusaNpyTeacher(stored(tmp_path / "t.npy", dict(zip(names, rows, strict=True))), "image")
    assert np.array_equal(teacher([sample("391895"), sample("k", image_id="1000092795")]), rows[:2, 0])
    for key in ("7", "train-391895"):  # two photos end in 7; a position in a split is no number of a photo
        with pytest.raises(ValueError, match="have no key"):
            teacher([sample(key)])


def test_the_identity_follows_the_bytes(tmp_path: Path):
    names = [stored(tmp_path / f"{n}.npy", {"x": vectors(1, 4) + n}) for n in (0, 1)]
    first, second = (CusaNpyTeacher(name, "image").identity["weights_sha256"] for name in names)
    assert first != second


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.float32(1.0) * np.ones((2, 3), np.float32)}, r"value of 'x' is \(2, 3\), want floats \(1, D\)"),
        ({"x": np.zeros((1, 1), np.float32)}, r"value of 'x' is \(1, 1\)"),
        ({"x": "text"}, r"value of 'x' is str"),
        ({"x": np.arange(3)}, "an array of 'i8', not of floats"),
        ({"x": vectors(1, 3), "y": vectors(1, 4)}, r"widths \[3, 4\]"),
        ([1, 2], r"an array \(2,\) of object, not one pickled dict"),
        ({}, "widths none"),
    ],
)
def test_what_is_no_vector_a_key_is_refused(tmp_path: Path, content: Any, message: str):
    with pytest.raises(ValueError, match=message):
        CusaNpyTeacher(stored(tmp_path / "a.npy", content), "image")


def test_code_missing_files_and_plain_arrays_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"it holds (posix|nt)\.system, which is refused"):
        read_dict(Path(stored(tmp_path / "bad.npy", {"x": Hostile(tmp_path / "ran")})))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="no teacher vectors at"):
        read_dict(tmp_path / "absent.npy")
    np.save(tmp_path / "plain.npy", vectors(3))
    with pytest.raises(ValueError, match="not one pickled dict"):
        read_dict(tmp_path / "plain.npy")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"text\.npy is no \.npy"):
        read_dict(tmp_path / "text.npy")


def test_teach_turns_them_into_a_store_in_step_with_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage, "_score", score_here)
    monkeypatch.setattr(stage, "_tracked", lambda *a: nullcontext())
    pack(tmp_path, scenes(6))
    rows = samples(tmp_path)
    given = vectors(len(rows), 1, 5)
    path = stored(tmp_path / "train_unicom.npy", {r.key: v for r, v in zip(rows[::-1], given[::-1], strict=True)})
    uri = stage.teach(recipe(tmp_path, {"kind": "cusa_npy", "options": {"path": path}}))["image"]
    kept = np.concatenate([open_store(uri).sidecar(f"{n:05d}.tar").vectors for n in range(2)])
    unit = given[:, 0] / np.linalg.norm(given[:, 0], axis=1, keepdims=True)
    assert np.abs(kept - unit).max() < 1e-3
