"""Sources: each raw format becomes the same kind of record, and what is missing is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from itm.data.records import Problem, Record
from itm.data.sources.coco import CocoCaptions
from itm.data.sources.csv import CsvPairs
from itm.data.sources.karpathy import Karpathy
from itm.data.sources.pairs_json import PairsJson
from itm.data.sources.precomp import Precomp
from itm.data.sources.source import unique_keys


@pytest.fixture
def photos(tmp_path):
    for name in ("a.jpg", "b.jpeg", "c.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def said(source, split: str = "train") -> dict[str, list[str]]:
    return {r.key: [c.text for c in r.captions] for r in source.records(split) if isinstance(r, Record)}


def save(path, rows) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def test_pairs_lists_join_the_rows_of_an_image_and_accept_lists_of_captions(photos):
    train = [
        {"image_path": "./a.jpg", "caption": "one", "image_id": "a.jpg"},
        {"image_path": "./a.jpg", "caption": "two ", "image_id": "a.jpg"},
        {"image_path": "./gone.jpg", "caption": "lost", "image_id": "x"},
    ]
    save(photos / "new_train.json", train)
    save(photos / "new_val.json", [{"image": "c.png", "caption": ["x", "y"]}])
    source = PairsJson(str(photos / "new_{split}.json"), str(photos))
    assert source.splits == ["train", "val"]
    assert said(source) == {"a": ["one", "two "]}
    record, problem = source.records("train")
    assert (record.image, record.image_format, record.meta["image_id"]) == (b"a.jpg", "jpg", "a.jpg")
    assert [c.id for c in record.captions] == ["a#0", "a#1"]
    assert isinstance(problem, Problem)
    assert problem.key == "gone"
    assert "No such file" in problem.reason
    assert said(source, "val") == {"c": ["x", "y"]}
    save(photos / "bad.json", [{"image": "c.png"}])
    with pytest.raises(ValueError, match="row 0 has no `caption`; it has image"):
        PairsJson({"train": str(photos / "bad.json")})
    with pytest.raises(ValueError, match="no split 'test'"):
        list(source.records("test"))


def test_restval_joins_train_unless_told_otherwise(photos):
    image = lambda k, split, name: {
        "imgid": k, "cocoid": 100 + k, "split": split, "filename": name, "filepath": "",
        "sentences": [{"raw": f"caption {k}", "sentid": 10 * k, "tokens": []}],
    }  # fmt: skip
    rows = [image(0, "train", "a.jpg"), image(1, "restval", "b.jpeg"), image(2, "test", "c.png")]
    path = save(photos / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    joined, apart = Karpathy(path, str(photos)), Karpathy(path, str(photos), restval_in_train=False)
    assert (joined.count("train"), joined.splits) == (2, ["train", "test"])
    assert apart.splits == ["train", "restval", "test"]
    assert joined.identity() != apart.identity()
    record = list(joined.records("train"))[1]
    assert (record.key, record.meta["image_id"], record.captions[0].id) == ("b", 101, "10")
    with pytest.raises(ValueError, match="no Karpathy split file"):
        Karpathy(save(photos / "x.json", {}))


def test_coco_annotations_find_their_images_by_id(photos):
    images = [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "c.png"}]
    notes = [{"id": 1, "image_id": 8, "caption": "c"}, {"id": 2, "image_id": 7, "caption": "a"}, {"id": 3, "image_id": 8, "caption": "cc"}]
    path = save(photos / "captions_val.json", {"images": images, "annotations": notes})
    source = CocoCaptions({"val": path}, str(photos))
    assert said(source, "val") == {"a": ["a"], "c": ["c", "cc"]}
    assert [c.id for r in source.records("val") for c in r.captions] == ["2", "1", "3"]
    with pytest.raises(ValueError, match="does not list"):
        CocoCaptions({"val": save(photos / "x.json", {"images": [], "annotations": notes})})


def test_tables_take_one_row_a_caption_or_several_columns(photos):
    (photos / "t.csv").write_text('\ufeffimage,caption,set\na.jpg,"one, two",train\nc.png,x,test\na.jpg,three,train\n', encoding="utf-8")
    source = CsvPairs(str(photos / "t.csv"), str(photos), split_column="set")
    assert said(source) == {"a": ["one, two", "three"]}
    assert said(source, "test") == {"c": ["x"]}
    (photos / "t.tsv").write_text("image\tfirst\tsecond\na.jpg\tx\ty\n")
    assert said(CsvPairs(str(photos / "t.tsv"), str(photos), caption_columns=["first", "second"])) == {"a": ["x", "y"]}
    (photos / "results.csv").write_text("image_name| number| comment\na.jpg| 0| A man .\na.jpg| 1| A dog .\n")
    flickr = CsvPairs(str(photos / "results.csv"), str(photos), "image_name", "comment", delimiter="|")
    assert said(flickr) == {"a": ["A man .", "A dog ."]}
    with pytest.raises(ValueError, match="no column caption; it has image, first, second"):
        CsvPairs(str(photos / "t.tsv"))
    with pytest.raises(ValueError, match="no annotation file"):
        CsvPairs(str(photos / "none_{split}.csv"))


@pytest.mark.parametrize("repeat", [1, 5])
def test_precomp_features_are_read_in_both_row_layouts(tmp_path, repeat):
    features = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    np.save(tmp_path / "dev_ims.npy", features.repeat(repeat, 0))
    (tmp_path / "dev_caps.txt").write_text("\n".join(f"caption {n} \u2028 ." for n in range(15)))
    source = Precomp(str(tmp_path))
    assert (source.splits, source.count("dev")) == (["dev"], 3)
    for index, record in enumerate(source.records("dev")):
        assert np.array_equal(record.regions.features, features[index].astype(np.float16))
        assert [c.text for c in record.captions] == [f"caption {5 * index + n} \u2028 ." for n in range(5)]
    (tmp_path / "dev_ids.txt").write_text("\n".join(f"{name}.jpg" for name in "xyz" for _ in range(repeat)) + "\n")
    assert [r.key for r in Precomp(str(tmp_path)).records("dev")] == ["x", "y", "z"]


def test_precomp_rows_that_cannot_be_right_are_refused(tmp_path):
    features = np.ones((5, 2, 3), np.float32) * np.arange(5)[:, None, None]
    (tmp_path / "dev_caps.txt").write_text("x\n" * 5)
    np.save(tmp_path / "dev_ims.npy", features)
    (problem,) = Precomp(str(tmp_path)).records("dev")
    assert "should be the same image" in problem.reason
    np.save(tmp_path / "dev_ims.npy", np.full((1, 2, 3), 1e9, np.float32))
    (problem,) = Precomp(str(tmp_path)).records("dev")
    assert "not finite" in problem.reason
    np.save(tmp_path / "dev_ims.npy", features[:2])
    with pytest.raises(ValueError, match=r"should be \(1 or 5, R, D\)"):
        Precomp(str(tmp_path))
    (tmp_path / "train_caps.txt").write_text("x\n" * 5)
    with pytest.raises(ValueError, match=r"train_caps\.txt is there and train_ims\.npy is not"):
        Precomp(str(tmp_path))
    with pytest.raises(ValueError, match=r"no \{split\}_ims"):
        Precomp(str(tmp_path / "none"))


def test_keys_are_stems_made_longer_where_they_collide():
    paths = ["./x/a.b.jpg", "x/c.jpg", "y/c.jpg", "y/c.png", "é .jpg"]
    keys = unique_keys(paths)
    assert keys[:4] == ["a_b", "c", "y_c", "y_c-3"]
    assert len(set(keys)) == 5
    assert all(key and not set("./ ") & set(key) for key in keys)


def faults(source, split: str = "train") -> list[str]:
    return [fault for r in source.records(split) if isinstance(r, Record) for c in r.captions if (fault := c.fault())]


def test_field_case_02_a_quote_between_tabs_is_text_and_swallows_no_row(photos):
    lines = ["image\tcaption", 'a.jpg\t"Stop" sign', 'b.jpeg\t"A man says hello', 'c.png\ta child with a "kite', 'a.jpg\tsaid ""twice""']
    (photos / "t.tsv").write_text("\n".join(lines) + "\n")
    source = CsvPairs(str(photos / "t.tsv"), str(photos))
    assert said(source) == {"a": ['"Stop" sign', 'said ""twice""'], "b": ['"A man says hello'], "c": ['a child with a "kite']}
    quoting = CsvPairs({"train": str(photos / "t.tsv")}, str(photos), quoting=False)
    assert quoting.identity() == source.identity()
    (photos / "t.tsv").write_text('image\tcaption\na.jpg\t"one\ttwo"\n')
    assert said(CsvPairs(str(photos / "t.tsv"), str(photos), quoting=True)) == {"a": ["one\ttwo"]}


@pytest.mark.parametrize("cell", ['"A man says hello', '"Stop" sign', '"on two\nlines"'])
def test_field_case_02_a_quoted_cell_that_does_not_end_with_its_line_is_refused_by_line_and_may_be_text(photos, cell):
    (photos / "t.csv").write_text(f"image,caption\na.jpg,first\nb.jpeg,{cell}\nc.png,last\n")
    with pytest.raises(ValueError, match=r"t\.csv line 3: a quoted cell does not end with the line .*quoting=false"):
        CsvPairs(str(photos / "t.csv"), str(photos))
    if "\n" not in cell:
        assert said(CsvPairs(str(photos / "t.csv"), str(photos), quoting=False)) == {"a": ["first"], "b": [cell], "c": ["last"]}


def test_field_case_03_unquoted_commas_belong_to_a_caption_in_the_last_column(photos):
    (photos / "t.csv").write_text('image,caption\na.jpg,"a dog, running"\nb.jpeg,a crowd of 1,000, and a dog \nc.png,two cats\n')
    expected = {"a": ["a dog, running"], "b": ["a crowd of 1,000, and a dog "], "c": ["two cats"]}
    assert said(CsvPairs(str(photos / "t.csv"), str(photos))) == expected


def test_field_case_03_cells_that_cannot_be_told_are_quarantined_with_their_line(photos):
    (photos / "t.csv").write_text('image,caption,split\na.jpg,a dog,train\na.jpg,one, two,train\nb.jpeg,a cat\nc.png,"x", y,z,train\n')
    source = CsvPairs(str(photos / "t.csv"), str(photos), split_column="split")
    assert [fault.partition("t.csv ")[2] for fault in faults(source)] == [
        "line 3 has 1 cells more than the header: quote the caption, or use another delimiter",
        "line 4 has no split",
        "line 5 has 2 cells more than the header: quote the caption, or use another delimiter",
    ]
    assert source.splits == ["train"]
    assert [c.text for c in next(source.records("train")).captions] == ["a dog", ""]
    (photos / "t.csv").write_text("image,first,second\na.jpg,x,y\nb.jpeg,x\n")
    both = CsvPairs(str(photos / "t.csv"), str(photos), caption_columns=["first", "second"])
    assert said(both) == {"a": ["x", "y"], "b": ["x", ""]}
    assert [fault.partition("t.csv ")[2] for fault in faults(both)] == ["line 3 has no second"]


def test_field_case_09_a_null_caption_is_quarantined_with_file_and_row_and_its_image_keeps_the_others(photos):
    rows = [{"image": "a.jpg", "caption": None}, {"image": "a.jpg", "caption": ["a cat", 7]}]
    source = PairsJson(save(photos / "null.json", rows), str(photos))
    assert said(source) == {"a": ["", "a cat", ""]}
    assert [fault.partition("null.json ")[2] for fault in faults(source)] == [
        "row 0: the caption is null",
        "row 1: the caption is of type int, no text",
    ]
    notes = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": None}]}
    assert faults(CocoCaptions(save(photos / "captions.json", notes), str(photos)))[0].endswith("annotation 0: the caption is null")
    image = {"filename": "a.jpg", "split": "train", "imgid": 0, "sentences": [{"raw": None, "sentid": 0}]}
    (fault,) = faults(Karpathy(save(photos / "dataset.json", {"images": [image]}), str(photos)))
    assert fault.endswith("image 0 sentence 0: the caption is null")


@pytest.mark.parametrize(
    ("source", "rows", "message"),
    [
        (PairsJson, [["a.jpg", "a dog"]], r"x\.json row 0 is a list, not an object with `caption`"),
        (PairsJson, [{"image": "a.jpg", "text": "a"}], r"x\.json row 0 has no `caption`; it has image, text"),
        (Karpathy, {"images": [{"filename": "a.jpg", "split": "train", "sentences": []}]}, r"x\.json image 0 has no `imgid`"),
        (Karpathy, {"images": [{"filename": "a.jpg", "split": "t", "imgid": 1}]}, r"x\.json image 0 has no `sentences`"),
        (
            Karpathy,
            {"images": [{"filename": "a.jpg", "split": "t", "imgid": 1, "sentences": [{"raw": "a"}]}]},
            r"sentence 0 has no `sentid`",
        ),
        (CocoCaptions, {"images": [{"id": 1}], "annotations": []}, r"x\.json image 0 has no `file_name`; it has id"),
        (
            CocoCaptions,
            {
                "images": [{"id": 1, "file_name": "a.jpg"}],
                "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}],
            },
            r"annotation 0 is an object with a box.*captions_\*\.json",
        ),
    ],
)
def test_field_case_09_a_field_that_is_missing_is_named_with_file_and_row(photos, source, rows, message):
    with pytest.raises(ValueError, match=message):
        source(save(photos / "x.json", rows))


def test_field_case_10_one_coco_id_for_two_images_is_refused_and_one_image_listed_twice_is_one(photos):
    notes = [{"id": 1, "image_id": 1, "caption": "one"}, {"id": 2, "image_id": 1, "caption": "two"}]
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "c.png"}]
    with pytest.raises(ValueError, match=r"the image id 1 is of a\.jpg and of c\.png"):
        CocoCaptions(save(photos / "x.json", {"images": images, "annotations": notes}))
    again = CocoCaptions(save(photos / "x.json", {"images": images[:1] * 2, "annotations": notes}), str(photos))
    assert said(again) == {"a": ["one", "two"]}
