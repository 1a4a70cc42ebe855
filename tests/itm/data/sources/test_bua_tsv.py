"""Bottom-up-attention TSV rows become records with regions and boxes; what does not fit is named with its place."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from itm.data.records import Problem, Record, Regions
from itm.data.shards import read_samples, write_shard
from itm.data.sources.bua_tsv import BuaTsv, read_row


def row(image_id: Any, features: np.ndarray, boxes: np.ndarray, count: int | None = None) -> bytes:
    cells = [image_id, 640, 480, len(features) if count is None else count]
    arrays = [base64.b64encode(a.astype(np.float32).tobytes()) for a in (boxes, features)]
    return b"\t".join([*(str(c).encode() for c in cells), *arrays]) + b"\n"


def arrays(seed: int, regions: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((regions, 5)).astype(np.float32), generator.uniform(0, 400, (regions, 4)).astype(np.float32)


def coco(path: Path, ids: list[int]) -> dict[str, Any]:
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in ids]
    said = [{"id": 10 * i + n, "image_id": i, "caption": f"caption {n} of {i}"} for i in ids for n in (0, 1)]
    path.write_text(json.dumps({"images": images, "annotations": said}))
    return {"kind": "coco_captions", "options": {"path": {"val": str(path)}}}


def test_rows_of_several_files_meet_their_captions_and_survive_a_shard(tmp_path: Path):
    (tmp_path / "a.tsv").write_bytes(row(9, *arrays(9)) + row(4, *arrays(4, regions=2)))
    (tmp_path / "b.tsv").write_bytes(row("000000000025", *arrays(25)))
    source = BuaTsv([str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv")], coco(tmp_path / "captions.json", [4, 25, 9]))
    records = [r for r in source.records("val") if isinstance(r, Record)]
    assert [r.meta["image_id"] for r in records] == [4, 25, 9]
    assert [c.text for c in records[1].captions] == ["caption 0 of 25", "caption 1 of 25"]
    write_shard(str(tmp_path / "0.tar"), records)
    for record, sample in zip(records, read_samples(str(tmp_path / "0.tar")), strict=True):
        features, boxes = arrays(record.meta["image_id"], regions=2 if record.meta["image_id"] == 4 else 3)
        assert sample.regions is not None
        found = Regions.from_npz(sample.regions)
        assert np.array_equal(found.features, features.astype(np.float16))
        assert found.boxes is not None and np.array_equal(found.boxes, boxes)
        assert (found.width, found.height) == (640, 480)


def test_an_image_without_a_row_is_a_problem_and_never_another_image(tmp_path: Path):
    (tmp_path / "a.tsv").write_bytes(row(0, *arrays(0)) + row("1000092795", *arrays(1)))
    sentence = {"sentid": 0, "raw": "a dog"}
    images = [
        {"split": "train", "filename": f"{name}.jpg", "imgid": n, "sentences": [{**sentence, "sentid": n}]}
        for n, name in enumerate(("36979", "1000092795"))
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    source = BuaTsv(str(tmp_path / "a.tsv"), {"kind": "karpathy", "options": {"path": str(tmp_path / "k.json")}})
    missing, found = source.records("train")
    assert isinstance(missing, Problem) and "36979.jpg has no row in" in missing.reason
    assert isinstance(found, Record) and found.key == "1000092795"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row(1, *arrays(0), count=4), "num_boxes is 4, but there are 12 box numbers and 15 feature numbers"),
        (row(1, *arrays(0), count=0), "num_boxes is 0"),
        (row(1, np.full((1, 2), 1e9), np.zeros((1, 4))), "not finite in float16"),
        (b"1\t2\t3\t4\tAAAA\n", "5 fields, want 6"),
        (b"1\t2\t3\t1\t!!\t??\n", "no base64"),
    ],
)
def test_a_broken_row_is_named(line: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        read_row(line)


def test_files_and_caption_sources_that_do_not_serve_are_refused(tmp_path: Path):
    captions = coco(tmp_path / "captions.json", [1])
    with pytest.raises(ValueError, match=r"gone\.tsv cannot be read"):
        BuaTsv(str(tmp_path / "gone.tsv"), captions)
    (tmp_path / "a.tsv").write_text("image_id,width\n1,2\n")
    with pytest.raises(ValueError, match=r"a\.tsv at byte 0 is no row of image_id image_w"):
        BuaTsv(str(tmp_path / "a.tsv"), captions)
    with pytest.raises(ValueError, match=r"captions\.kind='scenes' lists no images: take karpathy"):
        BuaTsv(str(tmp_path / "a.tsv"), {"kind": "scenes", "options": {"world": "tiny"}})


@pytest.mark.parametrize("twin", ["9", "0009"])
def test_field_case_10_one_image_id_on_two_rows_is_refused_with_both_places(tmp_path: Path, twin: str):
    (tmp_path / "a.tsv").write_bytes(row(4, *arrays(4)) + row(9, *arrays(9)))
    (tmp_path / "b.tsv").write_bytes(row(twin, *arrays(1)))
    captions = coco(tmp_path / "captions.json", [4, 9])
    with pytest.raises(ValueError, match=r"image_id 9 has a row in .*a\.tsv line 2 and in .*b\.tsv line 1"):
        BuaTsv([str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv")], captions)
    (tmp_path / "a.tsv").write_bytes(row(9, *arrays(4)) + row(4, *arrays(4)) + row(9, *arrays(9)))
    with pytest.raises(ValueError, match=r"image_id 9 has a row in .*a\.tsv line 1 and in .*a\.tsv line 3"):
        BuaTsv(str(tmp_path / "a.tsv"), captions)
