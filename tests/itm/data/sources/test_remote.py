"""Annotation files, lists, tables and images in an object store give the records that they give on a local disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from itm.data import files
from itm.data.records import Problem, Record
from itm.data.sources.parting import build_source
from tests.support.pictures import picture, write
from tests.support.s3_server import BUCKET, s3_server

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The same files in a folder and in a bucket."""
    folder = tmp_path_factory.mktemp("data")
    coco = {"images": [{"id": n, "file_name": f"{n}.png"} for n in range(5)]}
    coco["annotations"] = [{"id": 10 + n, "image_id": n, "caption": f"coco {n}"} for n in range(5)]
    karpathy = [
        {"filename": f"{n}.png", "split": "test" if n == 4 else "train", "imgid": n, "sentences": [{"raw": f"k {n}", "sentid": n}]}
        for n in range(5)
    ]
    write(
        folder,
        {f"im/{n}.png": picture(n) for n in range(4)}  # 4.png is missing
        | {
            "t.csv": "image,caption\n" + "".join(f"./{n}.png,row {n}\n" for n in range(5)),
            "new_train.json": json.dumps([{"image": f"{n}.png", "caption": [f"p {n}", "q"]} for n in range(5)]),
            "captions_train.json": json.dumps(coco),
            "dataset.json": json.dumps({"images": karpathy}),
            "val.txt": "2.png\n",
            "im/1.txt": "beside\n",
        },
    )
    table = {"image": [f"{n}.png" for n in range(5)], "text": [f"w {n}" for n in range(5)]}
    (folder / "tables").mkdir()
    pq.write_table(pa.table(table), folder / "tables" / "part.parquet", row_group_size=2)
    with s3_server():
        for name in files.walk(str(folder)):
            files.write_atomic(f"s3://{BUCKET}/{name}", (folder / name).read_bytes())
        yield str(folder), f"s3://{BUCKET}"


def content(kind: str, options: dict[str, Any], root: str) -> list[Any]:
    source = build_source(kind, json.loads(json.dumps(options).replace("ROOT", root)))
    rows: list[Any] = []
    for split in source.splits:
        for item in source.records(split):
            said = [c.text for c in item.captions] if isinstance(item, Record) else item.captions
            rows.append((split, item.key, said, item.image if isinstance(item, Record) else "lost"))
            if isinstance(item, Problem):
                assert f"{root}/im/4.png cannot be read" in item.reason
    return rows


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("csv", {"path": "ROOT/t.csv", "image_root": "ROOT/im", "split": {"val": "ROOT/val.txt"}}),
        ("csv", {"path": "ROOT/t.csv", "image_root": "ROOT/im"}),
        ("csv", {"path": "ROOT/t.csv", "image_root": "ROOT/im", "split": "ROOT/dataset.json"}),
        ("pairs_json", {"path": "ROOT/new_{split}.json", "image_root": "ROOT/im/"}),
        ("coco_captions", {"path": "ROOT/captions_{split}.json", "image_root": "ROOT/im"}),
        ("karpathy", {"path": "ROOT/dataset.json", "image_root": "ROOT/im"}),
        ("parquet", {"path": "ROOT/tables", "image_root": "ROOT/im"}),
        ("parquet", {"path": "ROOT/tables/*.parquet", "image_root": "ROOT/im", "split": {"val": 0.5}}),
        ("imagefolder", {"path": "ROOT/im"}),
    ],
)
def test_field_case_annotations_on_s3_a_source_reads_a_bucket_as_it_reads_a_folder(
    stores: tuple[str, str], kind: str, options: dict[str, Any]
) -> None:
    local, remote = stores
    here = content(kind, options, local)
    assert content(kind, options, remote) == here
    assert len(here) in (1, 4, 5)


def test_an_annotation_file_that_is_not_in_the_bucket_is_named(stores: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"no list at s3://{BUCKET}/none.txt"):
        build_source("csv", {"path": f"s3://{BUCKET}/t.csv", "split": {"val": f"s3://{BUCKET}/none.txt"}})
    for kind in ("csv", "pairs_json", "coco_captions", "karpathy"):
        with pytest.raises(ValueError, match=f"no annotation file at s3://{BUCKET}/none"):
            build_source(kind, {"path": f"s3://{BUCKET}/none.json"})


def test_a_zip_in_a_bucket_is_read_member_by_member(stores: tuple[str, str], tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for n in range(3):
            archive.writestr(f"{n}.png", picture(n))
    files.write_atomic(f"s3://{BUCKET}/a.zip", (tmp_path / "a.zip").read_bytes())
    source = build_source("imagefolder", {"path": f"s3://{BUCKET}/a.zip"})
    assert [r.image for r in source.records("train")] == [picture(n) for n in range(3)]
