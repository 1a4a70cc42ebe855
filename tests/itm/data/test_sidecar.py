"""The soft-label store: exact bytes back, rows joined by key, and every kind of damage named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from itm.data import sidecar as s

IDENTITY = {"kind": "statistics", "model": "hsv pyramid", "revision": "1"}
HEADER = s.Header(IDENTITY, "image", "fp16", "00000.tar", "ab" * 32)
KEYS = ["b", "a", "c"]


def vectors(n=3, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def unit(v):
    return v / np.sqrt((v.astype(np.float64) ** 2).sum(1, keepdims=True))


def write(folder, header=HEADER, keys=KEYS, v=None, **more):
    uri = str(folder / "00000.arrow")
    s.write_sidecar(uri, header, keys, vectors(len(keys)) if v is None else v, **more)
    return uri


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-7), ("fp16", 5e-4), ("int8", 8e-3)])
def test_what_is_written_comes_back_at_unit_length(tmp_path, dtype, tolerance):
    v = vectors(40, 384)
    uri = write(tmp_path, replace(HEADER, dtype=dtype), [f"k{i}" for i in range(40)], v)
    back = s.read_sidecar(uri, "ab" * 32, s.teacher_id(IDENTITY))
    assert back.vectors.shape == (40, 384)
    assert np.abs(back.vectors - unit(v)).max() < tolerance
    stored = unit(back.vectors)
    assert np.abs(stored @ stored.T - unit(v) @ unit(v).T).max() < tolerance


def test_equal_rows_give_equal_bytes(tmp_path):
    one = write(tmp_path)
    first = (tmp_path / "00000.arrow").read_bytes()
    assert write(tmp_path) == one
    assert (tmp_path / "00000.arrow").read_bytes() == first
    assert [f.name for f in tmp_path.iterdir()] == ["00000.arrow"]


def test_a_local_sidecar_is_memory_mapped(tmp_path):
    import pyarrow as pa

    uri = write(tmp_path, keys=[f"k{i}" for i in range(2000)], v=vectors(2000, 512))
    before = pa.total_allocated_bytes()
    mapped = s._open(uri).vectors
    assert not mapped.flags.writeable
    assert pa.total_allocated_bytes() - before < mapped.nbytes / 10


def test_an_unscored_row_keeps_its_place_and_its_reason(tmp_path):
    v = vectors()
    v[1] = 0
    back = s.read_sidecar(write(tmp_path, v=v, problems=[None, "cannot decode", None]))
    assert back.ok.tolist() == [True, False, True]
    assert back.problems[1] == "cannot decode"
    assert not back.vectors[1].any()
    assert back.header.rejected == 1


def test_caption_rows_keep_their_sample_key_and_caption_id(tmp_path):
    header, v = replace(HEADER, modality="text"), vectors(4)
    back = s.read_sidecar(write(tmp_path, header, ["a", "a", "b", "b"], v, captions=["0", "1", "0", "1"]))
    assert list(zip(back.keys, back.captions, strict=True)) == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]
    assert np.allclose(back.vectors, unit(v), atol=1e-3)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda v: v[:, 0], r"shape \(3,\)"),
        (lambda v: v[None], r"shape \(1, 3, 8\)"),
        (lambda v: v[:2], r"shape \(2, 8\) for 3 rows"),
        (lambda v: v[:, :1], r"width > 1"),
        (lambda v: v * [[1], [0], [1]], r"row 1, sample 'a'.*zero norm"),
        (lambda v: v * [[1], [1], [np.nan]], r"row 2, sample 'c'.*not finite"),
        (lambda v: v + np.array([[np.inf], [0], [0]]), r"row 0, sample 'b'.*not finite"),
    ],
)
def test_a_bad_teacher_vector_is_refused_and_nothing_is_written(tmp_path, spoil, said):
    with pytest.raises(ValueError, match=said):
        write(tmp_path, v=spoil(vectors()))
    assert not list(tmp_path.iterdir())


def test_a_bad_vector_inside_a_file_is_refused_when_read(tmp_path, monkeypatch):
    v = vectors()
    v[1] = 0
    with monkeypatch.context() as m:
        m.setattr(s, "_check", lambda *a: None)
        m.setattr(np.linalg, "norm", lambda x, axis, keepdims: np.ones((len(x), 1), np.float32))
        uri = write(tmp_path, v=v)
    with pytest.raises(ValueError, match=r"00000\.arrow: row 1, sample 'a'.*zero norm.*itm teach"):
        s.read_sidecar(uri)


def test_a_missing_foreign_or_damaged_sidecar_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"no sidecar at .*none\.arrow.*itm teach"):
        s.read_sidecar(str(tmp_path / "none.arrow"))
    uri = write(tmp_path)
    with pytest.raises(ValueError, match=r"another shard.*00000\.tar.*itm teach"):
        s.read_sidecar(uri, "cd" * 32)
    with pytest.raises(ValueError, match=r"scored by statistics-hsv-pyramid-.*expected other-.*itm teach"):
        s.read_sidecar(uri, None, s.teacher_id({"kind": "other"}))
    whole = (tmp_path / "00000.arrow").read_bytes()
    (tmp_path / "00000.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00000\.arrow is not a sidecar.*itm teach"):
        s.read_sidecar(uri)
    assert s.read_header(uri) is None


CHOICE = {"modality": "image", "kind": "statistics", "options": {"size": 64}, "dtype": "fp16"}


def store(tmp_path):
    root = str(tmp_path)
    uri = s.files.join(root, s.teacher_id(IDENTITY), "00000.arrow")
    header = s.write_sidecar(uri, HEADER, KEYS, vectors())
    s.write_store(root, CHOICE, {"00000.tar": header}, IDENTITY)
    return root


def test_a_store_is_found_from_the_choice_of_a_recipe(tmp_path):
    found = s.find_store(store(tmp_path), CHOICE)
    assert (found.teacher, found.width, found.modality) == (s.teacher_id(IDENTITY), 8, "image")
    assert found.sidecar("00000.tar", "ab" * 32).keys == KEYS
    found.check([("00000.tar", "ab" * 32)])
    with pytest.raises(ValueError, match=r"no soft-label store of the image teacher 'statistics'.*itm teach"):
        s.find_store(str(tmp_path), CHOICE | {"options": {"size": 32}})


def test_a_store_in_another_precision_is_named(tmp_path):
    root = store(tmp_path)
    with pytest.raises(ValueError, match=r"no soft-label store .*\(there is one with teachers\.dtype=fp16, not int8\): run `itm teach`"):
        s.find_store(root, CHOICE | {"dtype": "int8"})
    half = CHOICE | {"options": {"size": 64, "precision": "fp16"}}
    with pytest.raises(ValueError, match=r"teachers\.image\.options\.precision=fp32, not fp16\): run"):
        s.find_store(root, half)
    with pytest.raises(ValueError, match=r"below [^(]*: run `itm teach`"):
        s.find_store(root, half | {"options": {"size": 32}})


def test_a_store_refuses_shards_that_it_has_not_scored(tmp_path):
    found = s.find_store(store(tmp_path), CHOICE)
    with pytest.raises(ValueError, match=r"00001\.arrow.*itm teach"):
        found.check([("00000.tar", "ab" * 32), ("00001.tar", "ab" * 32)])
    with pytest.raises(ValueError, match=r"another version of 00000\.tar"):
        found.check([("00000.tar", "cd" * 32)])
    with pytest.raises(ValueError, match=r"store\.json is missing.*itm teach"):
        s.open_store(str(tmp_path), "statistics-unknown")


def test_teachers_that_differ_in_anything_have_different_ids():
    same = {"revision": "1", "model": "hsv pyramid", "kind": "statistics"}
    assert s.teacher_id(same) == s.teacher_id(IDENTITY)
    assert s.teacher_id(IDENTITY | {"revision": "2"}) != s.teacher_id(IDENTITY)
