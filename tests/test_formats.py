"""A file of a later version is refused by its name with both numbers and the remedy, by every reader, and stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import itm
from itm.config import Recipe, load_recipe
from itm.data.formats import NewerFormat, check_format
from itm.data.manifest import read_receipt
from itm.data.shards import index_shard, read_manifest
from itm.data.sidecar import open_store, read_header, read_sidecar
from itm.evaluation.tiles import TileStore
from itm.teachers.stores import store_for
from itm.training.checkpoint import latest
from pipelines.evaluate import evaluate
from pipelines.pack import pack
from pipelines.register import register
from pipelines.report import report
from pipelines.search import search
from pipelines.teach import teach
from pipelines.train import train
from tests.support.made_before import unpack

Reader = Callable[[Recipe], Any]
TEXT_STORE = "shards/train/teachers/scenes-text-ground-truth-tiny-7771425a2f"
SHARD = "shards/train/00000.tar"
STOPPED = "runs/stopped"
POINTER = "text-scenes_text-1bca6ec094.json"


def newest(path: Path) -> int:
    """What has a second format: splits, matchers, checkpoints of runs with patience, and all files of a soft-label store."""
    return 2 if path.name in ("manifest.json", "pack.json", "config.json") or {"teachers", "checkpoints"} & set(path.parts) else 1


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Of what version 0.1.0 wrote into the working directory; nothing here may reach a tracking server."""
    unpack(tmp_path, "matchers", "shards", "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    return load_recipe("recipe.yaml")


def resumed(recipe: Recipe) -> Any:
    return train(recipe.model_copy(update={"name": "stopped"}))


def searched(recipe: Recipe) -> Any:
    return search("a red circle", model="runs/whole/matcher", shards="shards/test")


READERS: list[tuple[str, Reader]] = [
    ("shards/train/manifest.json", lambda recipe: read_manifest("shards/train")),
    ("shards/train/manifest.json", resumed),
    ("shards/train/00000.index.json", lambda recipe: index_shard(SHARD)),
    ("shards/train/00000.index.json", pack),
    ("shards/train/pack.json", pack),
    (f"{TEXT_STORE}/store.json", lambda recipe: open_store(TEXT_STORE)),
    (f"shards/train/teachers/{POINTER}", lambda recipe: store_for(recipe, "train", "text")),
    ("matchers/vse/config.json", lambda recipe: itm.load_matcher("matchers/vse")),
    ("matchers/vse/inputs.json", lambda recipe: itm.load_matcher("matchers/vse")),
    ("matchers/vse/tokenizer/text.json", lambda recipe: itm.load_matcher("matchers/vse")),
    (f"{STOPPED}/checkpoints/000000004.json", lambda recipe: latest(f"{STOPPED}/checkpoints")),
    (f"{STOPPED}/started.json", resumed),
    ("runs/whole/run.json", train),
    ("runs/whole/run.json", register),
    ("runs/whole/run.json", report),
    ("runs/whole/evaluation.json", evaluate),
    ("runs/whole/evaluation.json", register),
    ("runs/whole/evaluation.json", report),
]


def refused(path: Path, found: str, reader: Callable[[], Any]) -> None:
    before = path.read_bytes()
    with pytest.raises(
        NewerFormat,
        match=rf"{path.name} has format {found}, this version reads up to {newest(path)}: upgrade itm-pipeline",
    ):
        reader()
    assert path.read_bytes() == before


@pytest.mark.parametrize(("name", "reader"), READERS)
def test_a_newer_json_is_refused_by_name_and_left_alone(name: str, reader: Reader, recipe: Recipe) -> None:
    path = Path(name)
    newer: object = "itm-3" if path.name == "manifest.json" else newest(path) + 1
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": newer, "said in another way": [1]}))
    refused(path, "2" if newer == 2 else "3", lambda: reader(recipe))


@pytest.mark.parametrize("newer", [3, "parquet-1", None])
def test_a_manifest_of_an_unknown_format_is_refused(newer: object, recipe: Recipe) -> None:
    path = Path("shards/train/manifest.json")
    path.write_text(json.dumps({"format": newer, "parts": []}))
    refused(path, repr(newer), lambda: read_manifest("shards/train"))


def test_a_newer_score_store_is_refused(recipe: Recipe) -> None:
    (path,) = Path("runs/whole").glob("scores-*/store.json")
    path.write_text(json.dumps({"format": 2, "tiles": {}}))
    refused(path, "2", lambda: TileStore.open(str(path.parent)))


def test_a_newer_sidecar_is_refused_and_never_taught_again(recipe: Recipe) -> None:
    path = Path(TEXT_STORE, "00001.arrow")
    with pa.ipc.open_file(pa.BufferReader(path.read_bytes())) as held:
        table = held.read_all()
    said = json.loads(table.schema.metadata[b"itm"]) | {"format": 3, "stored": "in another way"}
    with pa.ipc.new_file(str(path), table.schema.with_metadata({"itm": json.dumps(said)})) as sink:
        sink.write_table(table.replace_schema_metadata({"itm": json.dumps(said)}))
    for reader in (lambda: read_sidecar(str(path)), lambda: read_header(str(path)), lambda: teach(recipe)):
        refused(path, "3", reader)


def test_a_newer_kept_index_is_refused(recipe: Recipe) -> None:
    found = str(searched(recipe))
    (path,) = Path("shards/test/index").iterdir()
    assert str(searched(recipe)) == found
    with pa.OSFile(str(path), "rb") as source:
        tables = [pa.ipc.open_stream(source).read_all() for _ in range(2)]
    with pa.OSFile(str(path), "wb") as sink:
        for table in tables:
            newer = table.replace_schema_metadata({"itm": json.dumps({"format": 2})})
            with pa.ipc.new_stream(sink, newer.schema) as writer:
                writer.write_table(newer)
    refused(path, "2", lambda: searched(recipe))


def test_a_file_without_a_number_is_of_format_1_and_a_number_that_is_none_is_refused() -> None:
    check_format("x.json", {}, known=1)
    check_format("x.json", {"format": 1}, known=2)
    for found in ("1", True, 1.0, None, [1]):
        with pytest.raises(NewerFormat, match=r"x\.json has format .*, this version reads up to 1"):
            check_format("x.json", {"format": found}, known=1)


def test_a_damaged_receipt_is_still_made_again_and_no_newer_one(recipe: Recipe) -> None:
    path = Path("shards/train/00000.index.json")
    for damaged in (b"", b"[]", b"{}", b"\xff", b'{"format": 1, "info": 3}'):
        path.write_bytes(damaged)
        assert read_receipt(SHARD) is None
