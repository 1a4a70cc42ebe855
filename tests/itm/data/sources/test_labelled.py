"""Sets of labelled images are read as their authors lay them out, and a list that does not fit is named with file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from itm.data.records import Problem, Record
from itm.data.sources.labelled import Labelled
from tests.support import label_layouts
from tests.support.pictures import picture, write


def labels(source: Labelled) -> dict[str, Any]:
    """File below its set -> label, or (label, role)."""
    found = {}
    for record in source.records("test"):
        assert isinstance(record, Record)
        assert record.captions == []
        meta = record.meta
        found[meta["image_id"].partition("/")[2]] = (meta["label"], meta["role"]) if "role" in meta else meta["label"]
    return found


def test_the_four_published_sets_are_one_split_and_each_image_knows_its_set(tmp_path: Path) -> None:
    source = Labelled(label_layouts.all_four(tmp_path))
    assert source.splits == ["test"]
    assert source.uncaptioned("test")
    records = list(source.records("test"))
    assert [r.meta["set"] for r in records if isinstance(r, Record)] == ["cub"] * 5 + ["sop"] * 6 + ["inshop"] * 7 + ["inaturalist"] * 4
    assert len({r.key for r in records}) == len({r.image for r in records if isinstance(r, Record)}) == 22


def test_cub_is_judged_on_its_last_hundred_classes_or_as_its_split_file_says(tmp_path: Path) -> None:
    folder = str(label_layouts.cub(tmp_path))
    assert list(labels(Labelled({"cub": folder})).values()) == ["101", "101", "101", "200", "200"]
    listed = Labelled({"birds": {"path": folder, "layout": "cub_listed"}})
    assert list(labels(listed).values()) == ["1", "1", "101", "101", "200", "200"]


def test_in_shop_asks_answers_of_a_gallery_and_leaves_training_images_out(tmp_path: Path) -> None:
    found = labels(Labelled({"inshop": str(label_layouts.inshop(tmp_path))}))
    assert found["img/WOMEN/Dresses/id_00000007/a_1_front.jpg"] == ("id_00000007", "query")
    assert sorted(role for _, role in found.values()) == ["gallery"] * 4 + ["query"] * 3


def test_inaturalists_categories_are_joined_by_the_id_of_the_image(tmp_path: Path) -> None:
    assert list(labels(Labelled({"inaturalist": str(label_layouts.inaturalist(tmp_path))})).values()) == ["10", "10", "11", "11"]


def test_a_folder_a_class_and_lists_of_ones_own_give_the_same_images(tmp_path: Path) -> None:
    names = ["cats/1.png", "cats/deep/2.png", "dogs/3.png", "dogs/4.png"]
    write(tmp_path / "photos", {name: picture(n) for n, name in enumerate(names)} | {"cats/._1.png": "a Mac's", "cats/notes.md": "x"})
    rows = [(name, name.partition("/")[0]) for name in names]
    write(
        tmp_path / "photos",
        {
            "list.csv": "image,label\n" + "".join(f"{a},{b}\n" for a, b in rows),
            "list.jsonl": "".join(json.dumps({"image": a, "label": b}) + "\n" for a, b in rows),
            "list.txt": "".join(f"{a} {b}\n" for a, b in rows),
        },
    )
    said = [labels(Labelled({"mine": str(tmp_path / "photos" / name)})) for name in ("", "list.csv", "list.jsonl", "list.txt")]
    assert said == [dict(rows)] * 4


def test_an_image_file_that_is_missing_is_a_problem_and_not_the_end(tmp_path: Path) -> None:
    folder = label_layouts.sop(tmp_path)
    (folder / "chair_final/3_0.JPG").unlink()
    (problem,) = (item for item in Labelled({"sop": str(folder)}).records("test") if isinstance(item, Problem))
    assert "chair_final/3_0.JPG cannot be read: No such file" in problem.reason


def test_what_is_listed_makes_the_identity_and_where_it_lies_does_not(tmp_path: Path) -> None:
    one, other = (Labelled({"cub": str(label_layouts.cub(tmp_path / name))}) for name in "ab")
    assert one.identity() == other.identity()
    listed = Labelled({"cub": {"path": str(tmp_path / "a"), "layout": "cub_listed"}})
    assert listed.identity() != one.identity()


def changed(make: Callable[[Path], Path], file: str, old: str, new: str) -> Callable[[Path], Path]:
    def made(root: Path) -> Path:
        place = make(root)
        text = (root / file).read_text()
        assert re.search(old, text)
        (root / file).write_text(re.sub(old, new, text, count=1))
        return place

    return made


def without(make: Callable[[Path], Path], file: str) -> Callable[[Path], Path]:
    def made(root: Path) -> Path:
        place = make(root)
        (root / file).unlink()
        return place

    return made


CUB, SOP, INSHOP, INAT = label_layouts.cub, label_layouts.sop, label_layouts.inshop, label_layouts.inaturalist
LABELS, PARTS = "image_class_labels.txt", "Eval/list_eval_partition.txt"


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("cub", without(CUB, LABELS), r"no annotation file at .*image_class_labels\.txt"),
        (
            "cub",
            changed(CUB, LABELS, r"9 200\n", ""),
            r"image_class_labels\.txt does not name 1 of 9 images of .*images\.txt, the first is 9",
        ),
        ("cub", changed(CUB, "images.txt", r"9 200.*\n", ""), r"images\.txt does not name 1 of 9 images of .*labels\.txt, the first is 9"),
        ("cub", changed(CUB, LABELS, "9 200", "9 Wren"), r"labels\.txt: the class of image 9 is no number: 'Wren'"),
        ("cub", changed(CUB, LABELS, "9 200", "8 200"), r"labels\.txt line 9: the image 8 stands there twice"),
        (
            "cub",
            changed(CUB, LABELS, "9 200", "9 199"),
            r"cub \(.*\): nothing can be found for 2 of 5 images; .* whose label '200' no other",
        ),
        ("cub_listed", without(CUB, "train_test_split.txt"), r"no annotation file at .*train_test_split\.txt"),
        ("sop", without(SOP, "Ebay_test.txt"), r"no annotation file at .*Ebay_test\.txt"),
        ("sop", changed(SOP, "Ebay_test.txt", "image_id", "id"), r"Ebay_test\.txt line 1 is not the header `image_id class_id super"),
        ("sop", changed(SOP, "Ebay_test.txt", " 3 chair_final/5", " chair_final/5"), r"Ebay_test\.txt line 7 has 3 cells, not 4"),
        ("sop", changed(SOP, "Ebay_test.txt", "5_0.JPG", "4_0.JPG"), r"chair_final/4_0\.JPG is listed 2 times"),
        ("inshop", without(INSHOP, PARTS), r"no annotation file at .*Eval/list_eval_partition\.txt"),
        (
            "inshop",
            changed(INSHOP, PARTS, "8", "9"),
            r"list_eval_partition\.txt has 8 images, its first line says 9: the file is not whole",
        ),
        ("inshop", changed(INSHOP, PARTS, "train", "tain"), r"line 10: evaluation_status is train, query or gallery, not 'tain'"),
        ("inshop", changed(INSHOP, PARTS, "id_00000007 gallery", "id_00000006 gallery"), r"found for 2 of 7 .* no gallery image has"),
        (
            "inaturalist",
            changed(INAT, "val2018.json", '"images"', '"pictures"'),
            r"val2018\.json holds no lists `images` and `annotations`",
        ),
        ("inaturalist", changed(INAT, "val2018.json", '"image_id": 403', '"image_id": 402'), r"annotation 1: the image 402 has a category"),
        ("inaturalist", changed(INAT, "val2018.json", '"image_id": 403', '"image_id": 9'), r"image 3: no annotation gives the image 403"),
        ("inaturalist", changed(INAT, "val2018.json", '"category_id": 11', '"category": 1'), r"annotation 0 has no `category_id`"),
    ],
)
def test_a_list_that_is_missing_or_does_not_fit_is_named(tmp_path: Path, name: str, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labelled({name: str(make(tmp_path))})


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, "sets names no set"),
        ({"a/b": "x"}, "holds no slash"),
        ({"mine": {"layout": "cub"}}, r"sets\.mine is a folder, or \{path: \.\.\., layout: \.\.\.\}"),
        ({"mine": {"path": "x", "layout": "cup"}}, "unknown layout 'cup'; known: folders, list, cub"),
        ({"mine": {"path": "nowhere", "layout": "folders"}}, "no folder of class folders at .*nowhere"),
    ],
)
def test_sets_that_say_nothing_that_can_be_read_are_refused(sets: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labelled(sets)


def test_own_lists_with_bad_rows_or_images_outside_of_class_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"top.png": picture(), "a/1.png": picture(1)})
    with pytest.raises(ValueError, match=r"1 images lie in no class folder, the first is top\.png"):
        Labelled({"mine": str(tmp_path)})
    for text, message in (
        ("image,class\na/1.png,a\n", r"own\.csv line 2 has no `label`; it has image, class"),
        ("image,label\na/1.png,\n", r"own\.csv line 2: `label` is empty"),
        ("image,label,role\na/1.png,a,search\n", r"line 2: the role 'search' is none of query, gallery"),
        ("image,label,role\na/1.png,a,query\ntop.png,a,\n", "some rows have a role"),
    ):
        (tmp_path / "own.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            Labelled({"mine": str(tmp_path / "own.csv")})
