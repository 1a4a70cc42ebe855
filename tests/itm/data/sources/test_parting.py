"""Other splits than a source has: shares by content, lists and columns as people have them; each item is in one split or is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from itm.data.records import Problem, Record
from itm.data.sources import parting
from itm.data.sources.csv import CsvPairs
from itm.data.sources.parting import Parted, build_source
from itm.data.sources.source import Source
from tests.support.pictures import picture, write

SHARES = {"val": 0.2, "test": 0.3}


def photos(folder: Path, count: int, copies: int = 1) -> Path:
    """`count` different images, each under `copies` names, and a table of all."""
    names = [f"{n:03d}_{c}.png" for n in range(count) for c in range(copies)]
    write(folder, {name: picture(int(name[:3])) for name in names})
    write(folder, {"t.csv": "image,caption\n" + "".join(f"{name},words of {name}\n" for name in names)})
    return folder


def names_in(source: Source) -> dict[str, list[str]]:
    return {s: [r.meta["filename"] for r in source.records(s) if isinstance(r, Record)] for s in source.splits}


def test_field_case_one_annotation_file_a_share_is_of_the_images_whose_hash_lies_in_it_whatever_the_source(tmp_path):
    folder = photos(tmp_path, 80)
    table = {"image": [{"bytes": picture(n), "path": f"{n:03d}_0.png"} for n in range(80)], "text": [str(n) for n in range(80)]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet", row_group_size=7)
    wanted: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for n in range(80):
        number = int(hashlib.sha256(picture(n)).hexdigest()[:16], 16) / 16**16
        wanted["val" if number < 0.2 else "test" if number < 0.5 else "train"].append(f"{n:03d}_0.png")
    for kind, options in (
        ("csv", {"path": str(folder / "t.csv"), "image_root": str(folder)}), ("imagefolder", {"path": str(folder)}),
        ("parquet", {"path": str(tmp_path / "t.parquet")}),
    ):  # fmt: skip
        source = build_source(kind, options | {"split": SHARES})
        assert names_in(source) == wanted
        assert {s: source.count(s) for s in source.splits} == {s: len(names) for s, names in wanted.items()}
        assert {r.split for r in source.records("val") if isinstance(r, Record)} == {"val"}
    assert all(wanted.values())


def test_equal_bytes_never_straddle_and_added_photos_move_nobody(tmp_path):
    before = names_in(build_source("imagefolder", {"path": str(photos(tmp_path, 40, copies=3)), "split": SHARES}))
    of_image: dict[str, set[str]] = {}
    for split, names in before.items():
        for name in names:
            of_image.setdefault(name[:3], set()).add(split)
    assert len(of_image) == 40
    assert all(len(splits) == 1 for splits in of_image.values())
    after = names_in(build_source("imagefolder", {"path": str(photos(tmp_path, 60, copies=3)), "split": SHARES}))
    assert all(set(names) <= set(after[split]) for split, names in before.items())


def test_a_worker_needs_no_look_at_the_other_images(tmp_path, monkeypatch):
    options = {"path": str(photos(tmp_path, 30)), "split": SHARES}
    driver = build_source("imagefolder", options)
    wanted = names_in(driver)["val"]
    places = json.loads(json.dumps(driver.places("val", 0, driver.count("val"))))
    monkeypatch.setattr(parting, "_by_shares", lambda *args: pytest.fail("all images were read"))
    worker = build_source("imagefolder", options)
    assert [r.meta["filename"] for r in worker.at("val", places)] == wanted
    assert worker.uncaptioned("val")


def test_what_cannot_be_read_is_rejected_in_one_split(tmp_path):
    folder = photos(tmp_path, 30)
    for n in range(0, 30, 3):
        (folder / f"{n:03d}_0.png").unlink()
    source = Parted(CsvPairs(str(folder / "t.csv"), str(folder)), SHARES)
    problems = [p.key for s in source.splits for p in source.records(s) if isinstance(p, Problem)]
    assert sorted(problems) == [f"{n:03d}_0" for n in range(0, 30, 3)]
    assert sum(map(source.count, source.splits)) == 30


@pytest.mark.parametrize("form", ["files", "names", "karpathy"])
def test_lists_of_names_paths_or_keys_are_taken_and_what_is_in_none_is_named(tmp_path, form):
    folder = photos(tmp_path, 6)
    lists = {"train": ["000_0.png", "./001_0.png", "gone.png"], "val": ["002_0"], "test": ["003_0.png", "004_0.png"]}
    split: object = lists
    if form == "files":  # as Flickr8k's Flickr_8k.trainImages.txt
        write(tmp_path, {f"{s}Images.txt": "\r\n".join(names) + "\n" for s, names in lists.items()})
        split = {s: str(tmp_path / f"{s}Images.txt") for s in lists}
    if form == "karpathy":
        lists["val"] = ["002_0.png"]
        images = [{"filename": n.removeprefix("./"), "split": "restval" if n == "000_0.png" else s} for s in lists for n in lists[s]]
        split = str(tmp_path / "dataset.json")
        Path(split).write_text(json.dumps({"images": images}))
    source = build_source("csv", {"path": str(folder / "t.csv"), "image_root": str(folder), "split": split})
    assert names_in(source) == {"train": ["000_0.png", "001_0.png"], "val": ["002_0.png"], "test": ["003_0.png", "004_0.png"]}
    left = {p.key: p for p in source.passed_over("train")}
    assert left.keys() == {"005_0", "gone.png"}
    assert left["005_0"].reason == "in no list of data.source.options.split (test, train, val)"
    assert left["gone.png"].reason == "listed for train, but no image has this name"
    assert source.passed_over("val") == []


def test_a_column_names_the_split_of_a_row(tmp_path):
    write(tmp_path, {f"{n}.png": picture(n) for n in range(5)})
    rows = [{"file_name": f"{n}.png", "text": f"t{n}", "set": s} for n, s in enumerate(["train", "validation", "restval", "test", None])]
    write(tmp_path, {"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    source = build_source("imagefolder", {"path": str(tmp_path), "split": "set"})
    assert names_in(source) == {"train": ["0.png", "2.png"], "val": ["1.png"], "test": ["3.png"]}
    assert [(p.key, p.reason) for p in source.passed_over("train")] == [("4", "has no set, which names its split")]
    with pytest.raises(ValueError, match=r"split='fold' gives no image.*of an image is known: key='0'.*set='train'"):
        build_source("imagefolder", {"path": str(tmp_path), "split": "fold"}).splits  # noqa: B018


def test_splits_of_the_source_stay_beside_the_shares_of_its_training_split(tmp_path):
    folder = photos(tmp_path, 20)
    (folder / "held.csv").write_text("image,caption\n000_0.png,x\n")
    base = CsvPairs({"train": str(folder / "t.csv"), "test": str(folder / "held.csv")}, str(folder))
    source = Parted(base, {"val": 0.5})
    assert source.splits == ["train", "val", "test"]
    assert names_in(source)["test"] == ["000_0.png"]
    assert source.count("train") + source.count("val") == 20
    with pytest.raises(ValueError, match=r"has a split test already \(train, test\)"):
        Parted(base, {"test": 0.5})


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"val": 0.5, "test": 0.5}, "the shares of val, test are 1 together, and train has what is left of 1"),
        ({"train": 0.5, "test": 0.1}, "are 0.6 together"),
        ({"val": 10}, "shares are numbers between 0 and 1"),
        ({"val": 1e-9}, "split val gets none of 6 images for its share of 1e-09: give it a larger one"),
        ({"train": "none.txt"}, r"split\.train: no list at .*none\.txt"),
        ({"train": ["a"], "test": ["a"]}, "a is in the lists of train and of test"),
        ({"train": ["000_0"], "test": ["000_0.png"]}, "the image 000_0.png is in the lists of test and train"),
    ],
)
def test_a_split_that_cannot_be_is_refused_with_what_it_is(tmp_path, split, words):
    options = {"path": str(photos(tmp_path, 6) / "t.csv"), "image_root": str(tmp_path), "split": split}
    with pytest.raises(ValueError, match=words):
        list(build_source("csv", options).records("train"))


def test_other_shares_or_other_lists_are_another_identity(tmp_path):
    folder = photos(tmp_path, 4)
    seen = []
    for split in ({"val": 0.2}, {"val": 0.3}, {"val": str(folder / "l.txt")}):
        (folder / "l.txt").write_text("000_0\n")
        seen.append(json.dumps(build_source("csv", {"path": str(folder / "t.csv"), "split": split}).identity()))
    (folder / "l.txt").write_text("001_0\n")
    seen.append(json.dumps(build_source("csv", {"path": str(folder / "t.csv"), "split": {"val": str(folder / "l.txt")}}).identity()))
    assert len(set(seen)) == 4
