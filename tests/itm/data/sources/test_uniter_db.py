"""UNITER's databases, written here byte by byte as its tools do, and read as a source."""

from __future__ import annotations

import io
import json
from pathlib import Path

import lmdb
import msgpack
import numpy as np
import pyarrow as pa
import pytest

from itm.data.records import Problem, Record
from itm.data.sources.uniter_db import ImageDatabase, TextDatabase, UniterDb, region_count

NAMES = ["flickr30k_000000000001.npz", "flickr30k_000000000002.npz"]


def write(folder: Path, entries: dict[bytes, bytes]) -> Path:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 20) as env, env.begin(write=True) as writing:
        for key, value in entries.items():
            writing.put(key, value)
    return folder


def arrays(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((count, 2, 2)), 1).reshape(count, 4)
    norm_bb = np.concatenate([corners, corners[:, 2:] - corners[:, :2]], 1)
    made = {"features": rng.random((count, 5)), "norm_bb": norm_bb, "conf": np.linspace(0.9, 0.1, count)[:, None]}
    return {name: value.astype(np.float16) for name, value in made.items()}


def packed(held: dict[str, np.ndarray]) -> bytes:
    return msgpack.packb(
        {k: {b"nd": True, b"type": v.dtype.str, b"kind": b"", b"shape": v.shape, b"data": v.tobytes()} for k, v in held.items()}
    )


def zipped(held: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **held)  # type: ignore[arg-type]
    return buffer.getvalue()


def images(root: Path, pack=packed, folder: str = "feat_th0.2_max100_min10") -> Path:
    entries = {name.encode(): pack(arrays(4, k)) for k, name in enumerate(NAMES)}
    return write(root / "img" / folder, {**entries, b"__keys__": json.dumps(NAMES).encode()})


def texts(root: Path, **fields: str) -> Path:
    def lz4(value: dict) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "lz4") as out:
            out.write(msgpack.packb(value))
        return sink.getvalue().to_pybytes()

    owners = {"10": NAMES[0], "11": NAMES[0], "12": NAMES[1]}
    folder = write(root / "txt.db", {k.encode(): lz4({"input_ids": [1, 2, 3], "img_fname": v, **fields}) for k, v in owners.items()})
    for name, value in {
        "id2len": dict.fromkeys(owners, 3),
        "txt2img": owners,
        "img2txts": {NAMES[0]: ["10", "11"], NAMES[1]: ["12"]},
        "meta": {"CLS": 101, "SEP": 102},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("pack", [packed, zipped])
def test_the_image_database_gives_features_and_seven_box_numbers(tmp_path, pack):
    database = ImageDatabase(images(tmp_path, pack))
    features, boxes = database.tensors(NAMES[1])
    want = arrays(4, 1)
    np.testing.assert_array_equal(features, want["features"].astype(np.float32))
    np.testing.assert_array_equal(boxes[:, :6], want["norm_bb"].astype(np.float32))
    np.testing.assert_array_equal(boxes[:, 6], boxes[:, 4] * boxes[:, 5])


def test_the_region_counts_beside_the_database_cut_it(tmp_path):
    folder = images(tmp_path)
    (folder.parent / "nbb_th0.2_max100_min10.json").write_text(json.dumps({NAMES[0]: 2, NAMES[1]: 3}))
    database = ImageDatabase(folder)
    assert [len(database.tensors(name)[0]) for name in NAMES] == [2, 3]


def test_region_count_is_strict_and_bounded():
    conf = np.array([0.9, 0.21, 0.2, 0.1])
    assert [region_count(conf, 0.2, 1, 9), region_count(conf, 0.2, 3, 9), region_count(conf, 0.0, 1, 2)] == [2, 3, 2]


def test_the_text_database_gives_word_pieces_between_start_and_end(tmp_path):
    database = TextDatabase(texts(tmp_path))
    assert database.input_ids("11").tolist() == [101, 1, 2, 3, 102]
    with pytest.raises(ValueError, match="text 99 is not in"):
        database.input_ids("99")


def test_as_a_source_it_yields_images_with_regions_and_captions(tmp_path):
    source = UniterDb({"test": str(texts(tmp_path, raw="A dog runs ."))}, str(images(tmp_path)))
    records = list(source.records("test"))
    assert all(isinstance(r, Record) for r in records)
    assert [r.key for r in records] == [name.removesuffix(".npz") for name in NAMES]
    assert [[c.id for c in r.captions] for r in records] == [["10", "11"], ["12"]]
    assert records[0].captions[0].text == "A dog runs ."
    np.testing.assert_array_equal(records[1].regions.boxes, arrays(4, 1)["norm_bb"][:, :4].astype(np.float32))
    assert source.identity() == UniterDb({"test": str(tmp_path / "txt.db")}, str(tmp_path / "img/feat_th0.2_max100_min10")).identity()


def test_word_pieces_become_text_through_the_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\na\nskate\n##boarder\n")
    source = UniterDb({"test": str(texts(tmp_path))}, str(images(tmp_path)), vocab=str(tmp_path / "vocab.txt"))
    assert source.item("test", 0).captions[0].text == "a skateboarder"  # type: ignore[union-attr]


def test_without_text_and_vocabulary_the_remedy_is_named(tmp_path):
    with pytest.raises(ValueError, match="give vocab="):
        UniterDb({"test": str(texts(tmp_path))}, str(images(tmp_path)))


def test_an_image_in_no_database_and_an_unreadable_one_become_problems(tmp_path):
    broken = write(tmp_path / "broken", {NAMES[1].encode(): b"\xc1nonsense"})
    source = UniterDb({"test": str(texts(tmp_path, raw="x"))}, str(broken))
    first, second = source.records("test")
    assert isinstance(first, Problem)
    assert "in no image database" in first.reason
    assert isinstance(second, Problem)
    assert "unreadable" in second.reason


def test_a_folder_without_database_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no LMDB database"):
        ImageDatabase(tmp_path / "nowhere")
    (tmp_path / "txt.db").mkdir()
    with pytest.raises(ValueError, match="is no LMDB database"):
        TextDatabase(tmp_path / "txt.db")


def test_field_case_10_an_image_in_two_databases_or_a_text_of_two_images_is_refused_by_name(tmp_path):
    said = texts(tmp_path, raw="a man")
    both = [images(tmp_path / "a"), images(tmp_path / "b")]
    with pytest.raises(ValueError, match=rf"image {NAMES[0]} is in .*/a/img/.* and in .*/b/img/"):
        UniterDb({"val": str(said)}, [str(folder) for folder in both])
    UniterDb({"val": str(said)}, str(both[0]))
    (said / "img2txts.json").write_text(json.dumps({NAMES[0]: ["10", "11"], NAMES[1]: ["11", "12"]}))
    with pytest.raises(ValueError, match=rf"text 11 of .* is of {NAMES[1]} and of {NAMES[0]}: img2txts.json"):
        UniterDb({"val": str(said)}, str(both[0]))


def test_several_text_databases_of_a_split_are_one_and_the_vocabulary_is_read_where_it_is_needed(tmp_path):
    first, second = texts(tmp_path / "a", raw="A dog runs ."), texts(tmp_path / "b", raw="A cat sits .")
    source = UniterDb({"train": [str(first), str(second)]}, str(images(tmp_path)), vocab=str(tmp_path / "is-not-there.txt"))
    assert source.count("train") == 4
    assert [source.item("train", k).captions[0].text for k in (0, 2)] == ["A dog runs .", "A cat sits ."]
    with pytest.raises(ValueError, match=r"is-not-there"):
        UniterDb({"test": str(texts(tmp_path / "c"))}, str(images(tmp_path / "c")), vocab=str(tmp_path / "is-not-there.txt"))
