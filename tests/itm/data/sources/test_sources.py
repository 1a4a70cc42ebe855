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
    with pytest.raises(ValueError, match="row 0 needs"):
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
    with pytest.raises(ValueError, match=r"no \{split\}_ims"):
        Precomp(str(tmp_path / "none"))


def test_keys_are_stems_made_longer_where_they_collide():
    paths = ["./x/a.b.jpg", "x/c.jpg", "y/c.jpg", "y/c.png", "é .jpg"]
    keys = unique_keys(paths)
    assert keys[:4] == ["a_b", "c", "y_c", "y_c-3"]
    assert len(set(keys)) == 5
    assert all(key and not set("./ ") & set(key) for key in keys)
