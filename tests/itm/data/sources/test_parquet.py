"""Tables of images: each form people have gives the records a loop over its rows gives; a worker reads only what it was told to."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather, ipc

from itm.data.records import Problem, Record
from itm.data.sources.parquet import Parquet
from itm.data.sources.source import Source
from tests.support.pictures import picture, write

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def cell(seed: int, path: str | None = None) -> dict[str, object]:
    return {"bytes": picture(seed), "path": path}


def save(path: Path, group: int = 2, **columns: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {n: pa.array(v, STRUCT) if n == "image" and not isinstance(v[0], str | bytes) else pa.array(v) for n, v in columns.items()}
    pq.write_table(pa.table(made), path, row_group_size=group)
    return str(path)


def pairs(source: Source, split: str = "train") -> list[tuple[bytes, list[str]]]:
    return [(r.image, [c.text for c in r.captions]) for r in source.records(split) if isinstance(r, Record)]


def test_field_case_parquet_a_row_an_image_has_a_list_of_captions_or_several_columns(tmp_path):
    save(tmp_path / "a.parquet", image=[cell(n) for n in range(3)], captions=[["x", "y"], ["z"], ["u", "v", "w"]])
    assert pairs(Parquet(str(tmp_path / "a.parquet"))) == [(picture(0), ["x", "y"]), (picture(1), ["z"]), (picture(2), ["u", "v", "w"])]
    save(tmp_path / "b.parquet", image=[cell(0), cell(0)], first=["x", "y"], second=["z", "u"])
    assert pairs(Parquet(str(tmp_path / "b.parquet"), caption_columns=["first", "second"])) == [
        (picture(0), ["x", "z"]),
        (picture(0), ["y", "u"]),
    ]


@pytest.mark.parametrize("way", ["bytes", "id", "path"])
def test_field_case_parquet_a_row_a_caption_is_joined_by_bytes_id_or_path_over_files_and_row_groups(tmp_path, way):
    """Images 0 1 2 0 1 2 ...: no two rows of one image lie beside each other."""
    for file in range(2):
        numbers = [n % 3 for n in range(5 * file, 5 * file + 5)]
        columns: dict[str, object] = {"text": [f"{n} in {file}" for n in range(5)], "image": [cell(n) for n in numbers]}
        if way == "id":
            columns["image_id"] = numbers
        if way == "path":
            columns["image"] = [f"{n}.png" for n in numbers]
        save(tmp_path / "data" / f"part-{file}.parquet", **columns)
    write(tmp_path, {f"{n}.png": picture(n) for n in range(3)})
    wanted: dict[bytes, list[str]] = {}
    for n in range(10):
        wanted.setdefault(picture(n % 3), []).append(f"{n % 5} in {n // 5}")
    source = Parquet(str(tmp_path / "data"), image_root=str(tmp_path))
    assert pairs(source) == list(wanted.items())
    assert len(pairs(Parquet(str(tmp_path / "data"), group_by="row", image_root=str(tmp_path)))) == 10
    records = list(source.records("train"))
    assert [r.key for r in records] == ["part-0-000000", "part-0-000001", "part-0-000002"]
    assert [r.meta["image_id"] for r in records] == ([0, 1, 2] if way == "id" else [r.key for r in records])
    assert [a["key"] for a in source.abouts("train")] == [r.key for r in records]
    assert [a.get("filename") for a in source.abouts("train")] == [r.meta.get("filename") for r in records]


def test_a_slice_is_read_by_a_process_that_never_looked_through_the_data(tmp_path, monkeypatch):
    uri = save(tmp_path / "a.parquet", image=[cell(n % 4) for n in range(12)], text=[f"t{n}" for n in range(12)])
    driver = Parquet(uri)
    places = json.loads(json.dumps(driver.places("train", 1, 3)))
    monkeypatch.setattr(Parquet, "_group", lambda *args: pytest.fail("the data was looked through"))
    assert pairs(driver)[1:3] == [(r.image, [c.text for c in r.captions]) for r in Parquet(uri).at("train", places)]


def test_splits_are_told_by_names_globs_and_mappings(tmp_path):
    for name in ("data/train-00000-of-00001", "data/validation-00000-of-00001", "data/test-00000-of-00001"):
        save(tmp_path / f"{name}.parquet", image=[cell(len(name))], text=[name])
    for path in (str(tmp_path), str(tmp_path / "data" / "*.parquet"), str(tmp_path / "data" / "{split}-*.parquet")):
        source = Parquet(path)
        assert source.splits == ["train", "val", "test"]
        assert [len(pairs(source, split)) for split in source.splits] == [1, 1, 1]
        assert pairs(source, "val")[0][1] == ["data/validation-00000-of-00001"]
    chosen = Parquet(
        {"train": [str(tmp_path / "data" / "train-*"), str(tmp_path / "data" / "validation-*")], "test": str(tmp_path / "data" / "test-*")}
    )
    assert [(split, chosen.count(split)) for split in chosen.splits] == [("train", 2), ("test", 1)]
    save(tmp_path / "data" / "more.parquet", image=[cell(9)], text=["x"])
    with pytest.raises(ValueError, match=r"more.parquet names no split, where other files do \(test, train, val\)"):
        Parquet(str(tmp_path))
    with pytest.raises(ValueError, match="no Parquet or Arrow file at .*none"):
        Parquet(str(tmp_path / "none"))


@pytest.mark.parametrize("form", ["stream", "file", "feather", "save_to_disk"])
def test_arrow_files_and_saved_data_sets_are_read(tmp_path, form):
    table = pa.table({"image": pa.array([cell(n) for n in range(5)], STRUCT), "text": [f"t{n}" for n in range(5)]})
    path = tmp_path / "train"
    path.mkdir()
    name = path / ("data-00000-of-00001.arrow" if form != "feather" else "x.feather")
    if form == "feather":
        feather.write_feather(table, name, compression="zstd")
    else:
        with (ipc.new_file if form == "file" else ipc.new_stream)(str(name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    if form == "save_to_disk":
        write(
            tmp_path,
            {"dataset_dict.json": '{"splits": ["train"]}', "train/state.json": json.dumps({"_data_files": [{"filename": name.name}]})},
        )
        write(tmp_path, {"train/cache-12.arrow": b"left by a map"})
    source = Parquet(str(tmp_path))
    assert pairs(source) == [(picture(n), [f"t{n}"]) for n in range(5)]
    assert [r.image for r in source.records("train", 3, 4)] == [picture(3)]


def test_rows_that_cannot_be_used_are_named_with_file_and_row_and_none_is_lost(tmp_path):
    images = [
        cell(0),
        None,
        {"bytes": None, "path": "gone.png"},
        {"bytes": b"<html>", "path": "d.png"},
        {"bytes": b"", "path": None},
        cell(5),
    ]
    uri = save(tmp_path / "a.parquet", image=images, text=["a", "b", "c", "d", "e", None])
    items = list(Parquet(uri).records("train"))
    reasons = [i.reason.removeprefix(f"{uri} ") for i in items if isinstance(i, Problem)]
    assert reasons[0] == "row 1: the image is null"
    assert reasons[1] == f"row 2: {Path.cwd() / 'gone.png'} cannot be read: No such file or directory"
    assert reasons[2:] == ["row 3: the image d.png is no image: its bytes are of no known format", "row 4: the image is empty"]
    faults = [c.fault() for i in items if isinstance(i, Record) for c in i.captions if c.fault()]
    assert faults == [f"{uri} row 5: the caption is null"]
    assert sum(len(i.captions) if isinstance(i, Record) else i.captions for i in items) == len(items) == 6


def test_a_row_group_that_cannot_be_read_costs_its_rows_and_no_others(tmp_path):
    path = tmp_path / "a.parquet"
    save(path, image=[cell(n) for n in range(6)], text=[f"t{n}" for n in range(6)])
    spoilt = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = spoilt.dictionary_page_offset or spoilt.data_page_offset
    data[start : start + spoilt.total_compressed_size] = b"\xff" * spoilt.total_compressed_size
    path.write_bytes(data)
    items = list(Parquet(str(path)).records("train"))
    assert [i.image for i in items if isinstance(i, Record)] == [picture(n) for n in (0, 1, 4, 5)]
    problems = [i for i in items if isinstance(i, Problem)]
    assert [p.key for p in problems] == ["a-000002", "a-000003"]
    assert all(f"{path}: row group 1 cannot be read" in p.reason for p in problems)


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"picture": [b"x"], "text": ["a"]}, {}, "has no column image; it has picture, text: set image_column"),
        ({"image": [b"x"], "said": ["a"]}, {}, "no column caption, captions, text; it has image, said: set caption_columns"),
        ({"image": [b"x"], "text": ["a"]}, {"group_by": "id"}, r"has no column id; it has image, text \(set"),
        ({"image": [b"x"], "text": ["a"]}, {"caption_columns": ["text", "more"]}, "has no column more; it has image, text"),
    ],
)
def test_columns_that_are_not_there_are_named_with_those_that_are(tmp_path, columns, options, words):
    with pytest.raises(ValueError, match=words):
        Parquet(save(tmp_path / "a.parquet", **columns), **options)


def test_what_is_no_table_is_named(tmp_path):
    whole = Path(save(tmp_path / "a.parquet", image=[cell(0)], text=["a"])).read_bytes()
    write(
        tmp_path,
        {"half.parquet": whole[:-20], "lfs.parquet": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "x.arrow": "what"},
    )
    for name, words in (
        ("half.parquet", "no whole Parquet"),
        ("lfs.parquet", "git lfs pull"),
        ("x.arrow", "no whole Parquet or Arrow file"),
    ):
        with pytest.raises(ValueError, match=f"{name} .*{words}"):
            Parquet(str(tmp_path / name))


def test_bytes_alone_dictionaries_and_large_strings_are_read_and_numbers_are_kept(tmp_path):
    text = pa.array(["dog", "dog"]).dictionary_encode()
    table = {
        "image": [picture(1), picture(2)],
        "caption": text,
        "score": [0.5, float("nan")],
        "note": pa.array(["n", None], pa.large_string()),
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    first, second = Parquet(str(tmp_path / "a.parquet")).records("train")
    assert [c.text for r in (first, second) for c in r.captions] == ["dog", "dog"]
    assert (first.meta["score"], first.meta["note"]) == (0.5, "n")
    assert second.meta.keys() == {"image_id"}


def test_another_row_or_choice_is_another_identity(tmp_path):
    uri = save(tmp_path / "a.parquet", image=[cell(0)], text=["a"])
    seen = [json.dumps(Parquet(uri, **options).identity()) for options in ({}, {"group_by": "row"}, {"caption_columns": []})]
    save(tmp_path / "a.parquet", image=[cell(0)], text=["b"])
    assert len({*seen, json.dumps(Parquet(uri).identity())}) == 4
