"""A data set by name or folder through `datasets`: the records are those of its own reader."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from itm.data.sources.hub import Hub
from itm.extras import MissingExtra
from tests.support.pictures import picture, said, write

try:
    import datasets
except ModuleNotFoundError:
    datasets = None

needs_datasets = pytest.mark.skipif(
    datasets is None, reason="NOT TESTED: the source hub; `datasets` is not installed (pip install -e '.[hf]')"
)


def repository(folder: Path) -> Path:
    """Parquet files of two splits, as the hub holds them, with a card that names their configuration."""
    for split, numbers in (("train", (0, 1, 0, 2)), ("validation", (3,))):
        rows = {
            "image": [{"bytes": picture(n), "path": f"{n}.png"} for n in numbers],
            "caption": [f"{split} {k}" for k in range(len(numbers))],
        }
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table = pa.table(rows)
        known = {"info": {"features": {"image": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"}}}}
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(known)}), folder / "data" / f"{split}-00000-of-00001.parquet"
        )
    write(folder, {"README.md": "---\nlicense: mit\n---\nA card.\n"})
    return folder


@needs_datasets
def test_field_case_datasets_name_a_local_repository_is_read_and_captions_of_one_image_are_joined(tmp_path):
    source = Hub(str(repository(tmp_path / "repo")), cache_dir=str(tmp_path / "cache"))
    assert source.splits == ["train", "val"]
    assert [(r.image, [c.text for c in r.captions]) for r in source.records("train")] == [
        (picture(0), ["train 0", "train 2"]), (picture(1), ["train 1"]), (picture(2), ["train 3"]),
    ]  # fmt: skip
    assert said(source, "val") == {"3.png": ["validation 0"]}
    assert Hub(str(tmp_path / "repo"), cache_dir=str(tmp_path / "cache")).identity() == source.identity()


@needs_datasets
def test_a_local_repository_of_image_files_is_read(tmp_path):
    rows = [{"file_name": f"{n}.png", "text": f"words {n}"} for n in range(3)]
    write(tmp_path / "repo", {f"train/{n}.png": picture(n) for n in range(3)} | {"train/metadata.jsonl": "\n".join(map(json.dumps, rows))})
    source = Hub(str(tmp_path / "repo"), cache_dir=str(tmp_path / "cache"))
    assert sorted((r.image, r.captions[0].text) for r in source.records("train")) == sorted((picture(n), f"words {n}") for n in range(3))


@needs_datasets
def test_a_saved_data_set_is_what_the_source_parquet_reads(tmp_path):
    from itm.data.sources.parquet import Parquet

    held = datasets.load_dataset(str(repository(tmp_path / "repo")), cache_dir=str(tmp_path / "cache"))
    held["train"] = held["train"].select([3, 1])  # rows behind indices, which saving writes out
    held.save_to_disk(str(tmp_path / "saved"))
    source = Parquet(str(tmp_path / "saved"))
    assert [(r.image, r.captions[0].text) for r in source.records("train")] == [(picture(2), "train 3"), (picture(1), "train 1")]
    assert said(source, "val") == {"3.png": ["validation 0"]}


@needs_datasets
def test_what_cannot_be_had_is_named_in_a_line_with_the_options(tmp_path):
    with pytest.raises(ValueError, match=r"the data set someone/none cannot be had: .*\(options: name, revision") as told:
        Hub("someone/none", cache_dir=str(tmp_path))
    assert len(str(told.value)) < 400
    with pytest.raises(ValueError, match="cannot be had"):
        Hub(str(repository(tmp_path / "repo")), name="other", cache_dir=str(tmp_path / "cache"))


def test_without_the_extra_the_line_for_pip_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises((MissingExtra, ModuleNotFoundError), match=r"the source hub needs datasets: pip install 'itm-pipeline\[hf\]'"):
        Hub("someone/none")
