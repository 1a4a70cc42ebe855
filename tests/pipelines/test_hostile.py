"""What bad input does to whole stages: it is left out by name and counted, or refused by name; it is never lost and never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from itm.config import Text
from itm.data.manifest import NAME, Manifest
from itm.data.pairs import Pairs, Work
from itm.data.plan import Plan
from itm.data.preprocess import ImageInput, Inputs, read_regions
from itm.data.records import MAX_CAPTION, MAX_PIXELS, MAX_REGION_BYTES, Problem
from itm.data.shards import read_manifest, read_samples
from itm.data.text import build_tokenizer
from itm.evaluation.dataset import encode_split
from pipelines.evaluating.driver import flow_of
from pipelines.teaching import driver as stage
from pipelines.train import train
from tests.support.noise_split import png, small_split
from tests.support.small_teaching import recipe as teach_recipe
from tests.support.small_teaching import score_here
from tests.support.small_training import recipe
from tests.support.tars import tar_of


@pytest.fixture(autouse=True, scope="module")
def _tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


def jpeg(side: int = 40) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of a few KB with more pixels than any camera takes."""
    side, out = int(MAX_PIXELS**0.5) + 1, io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG")
    return out.getvalue()


def said(*captions: Any) -> bytes:
    return json.dumps({"captions": list(captions)}).encode()


HOSTILE: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "corrupt jpeg": ([("bad.jpg", jpeg()[:200] + b"\0" * 400), ("bad.json", said("x"))], "cannot decode image"),
    "truncated jpeg": ([("bad.jpg", jpeg()[:-300]), ("bad.json", said("x"))], "cannot decode image"),
    "empty image": ([("bad.jpg", b""), ("bad.json", said("x"))], "no image and no regions"),
    "pixel bomb": ([("bad.png", bomb()), ("bad.json", said("x"))], "the limit is"),
    "a program for an image": (
        [("bad.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("bad.json", said("x"))],
        "no known image format",
    ),
    "missing captions": ([("bad.jpg", jpeg())], "no caption"),
    "captions of 10^6 characters": ([("bad.jpg", jpeg()), ("bad.json", said("x" * 1_000_000))], f"the limit is {MAX_CAPTION:,}"),
    "wrong UTF-8": ([("bad.jpg", jpeg()), ("bad.txt", b"caf\xe9 \xff")], "captions cannot be read"),
    "half a surrogate": ([("bad.jpg", jpeg()), ("bad.json", b'{"captions": ["\\ud800"]}')], "is not Unicode text"),
    "endless nesting": ([("bad.jpg", jpeg()), ("bad.json", b"[" * 200_000)], "captions cannot be read"),
    "a number for a caption": ([("bad.jpg", jpeg()), ("bad.json", said(7))], "captions cannot be read"),
}


def split_with(folder: Path, bad: list[tuple[str, bytes]], good: int = 9) -> Manifest:
    """Nine good samples and the bad one in the middle of a foreign tar."""
    folder.mkdir(parents=True)
    pairs = [[(f"k{n}.png", png(n)), (f"k{n}.json", said(f"a red thing {n}"))] for n in range(good)]
    tar_of(folder / "0.tar", [member for sample in (*pairs[:4], bad, *pairs[4:]) for member in sample])
    return read_manifest(str(folder))


def inputs(**image: Any) -> Inputs:
    return Inputs(ImageInput(**{"size": 16, **image}), build_tokenizer(Text(max_length=10), ["a red thing 1 2 3"]))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_sample_is_named_and_counted_by_every_reader(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, reason = HOSTILE[name]
    manifest = split_with(tmp_path / "train", bad)
    # the reader: rows in = rows out + rejected
    assert manifest.samples + manifest.rejected == 10
    # training: a batch of all pairs keeps its size; each pair that left has its reason
    pairs = Pairs(str(tmp_path / "train"), manifest, Plan.of(manifest, seed=0, batch=manifest.captions), inputs(), {})
    rows = pairs(Work(0, 0, 0))
    left = [json.loads(row) for row in rows["problem"].drop_null().to_pylist()]
    assert len(rows) == manifest.captions
    assert set(rows["key"].to_pylist()) == {f"k{n}" for n in range(9)}
    found = left + [vars(item) for item in read_samples(str(tmp_path / "train/0.tar")) if isinstance(item, Problem)]
    assert [(row["key"], row["shard"]) for row in found if row["what"] == "sample"] == [("bad", "0.tar")]
    assert any(reason in row["reason"] for row in found), found
    # teaching: rows keep their place, the reason is in the quarantine table
    monkeypatch.setattr(stage, "_score", score_here)
    flow: dict[str, float] = {}
    told = SimpleNamespace(metrics=flow.update, flush=lambda: None, artifact=lambda path: None)
    monkeypatch.setattr(stage, "_tracked", lambda *a: nullcontext(told))
    uri = stage.teach(teach_recipe(tmp_path, {"kind": "statistics"}, max_reject_rate=0.2))["image"]
    assert (flow["rows_in"], flow["rows_out"], flow["rows_rejected"]) == (10, 9, 1)
    (row,) = [json.loads(line) for line in (Path(uri) / "quarantine.jsonl").read_text().splitlines()]
    assert (row["key"], row["shard"], reason in row["reason"] or name == "pixel bomb") == ("bad", "0.tar", True)


def test_evaluation_and_training_count_what_they_left_out_and_mlflow_shows_it(tmp_path: Path) -> None:
    from itm.matchers.folder import load_matcher_folder
    from itm.tracking.runs import client

    small_split(tmp_path / "shards", "train", broken=(4, 7))
    small_split(tmp_path / "shards", "val", shards=1, broken=(2,))
    done = train(recipe(tmp_path, data={"max_reject_rate": 0.2}, steps=16))  # two epochs of 48 pairs
    # samples 4 and 7 have two captions each, and each is met twice
    assert (done["rows_in"], done["rows_out"], done["rows_rejected"]) == (96, 88, 8)
    shown = client().get_run(done["run_id"]).data.metrics
    assert [shown[f"train/rows_{way}"] for way in ("in", "out", "rejected")] == [done[f"rows_{way}"] for way in ("in", "out", "rejected")]
    split = str(tmp_path / "shards/val")
    encoded = encode_split(load_matcher_folder(tmp_path / "runs/run/matcher"), split)
    assert flow_of(encoded, split, read_manifest(split)) == {"rows_in": 8, "rows_out": 7, "rows_rejected": 1}
    other = read_manifest(split).model_copy(update={"shards": [read_manifest(split).shards[0].model_copy(update={"samples": 9})]})
    with pytest.raises(ValueError, match=r"7 images and 1 rejected ones, its manifest says 9: the shard changed"):
        flow_of(encoded, split, other)


def crafted_npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, allow_pickle=True, **arrays)
    return out.getvalue()


class Shell:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_region_file_is_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for data in (crafted_npz(features=np.array([[Shell(trap)]], object)), pickle.dumps(Shell(trap))):
        with pytest.raises(ValueError, match="not a region file"):
            read_regions(data, limit=4)
    assert not trap.exists()


REGIONS = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"features": REGIONS * np.nan}, "not finite"),
        ({"features": REGIONS * np.inf}, "not finite"),
        ({"features": REGIONS.astype(np.float64) * 1e300}, "not finite"),
        ({"features": REGIONS, "boxes": np.full((2, 4), np.nan), "width": 4, "height": 4}, "not finite"),
        ({"features": REGIONS, "boxes": np.ones((2, 4))}, "needs the width and height"),
        ({"features": REGIONS, "boxes": np.ones((2, 4)), "width": np.ones(3), "height": 4}, "'width' must be one number"),
        ({"features": REGIONS, "boxes": np.ones((3, 4))}, r"boxes must be \(2, 4\)"),
        ({"features": REGIONS[0]}, r"must be \(R, Dv\)"),
        ({"features": REGIONS[:0]}, r"must be \(R, Dv\)"),
        ({"features": np.array([["a", "b"]])}, "must hold numbers"),
        ({"other": REGIONS}, "needs the array 'features'"),
        ({"features": np.zeros((2, MAX_REGION_BYTES // 4), np.float32)}, "the limit is"),
        ({"features": np.ones((2, 4))}, "4 wide, those of this matcher 3"),
    ],
)
def test_region_arrays_that_are_not_what_they_should_be_are_refused(arrays: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_regions(crafted_npz(**{name: np.asarray(value) for name, value in arrays.items()}), limit=4, width=3)


def test_a_region_file_that_lies_about_its_size_is_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + b"\n"
        archive.writestr("features.npy", header)
    with pytest.raises(ValueError, match="not a region file"):
        read_regions(out.getvalue(), limit=4)


def test_names_that_are_not_unicode_are_left_out_and_their_row_can_be_written(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("caf\udce9.jpg"))
    (problem,) = read_samples(str(tmp_path / "x.tar"))
    assert isinstance(problem, Problem)
    assert "is not UTF-8" in problem.reason
    assert json.loads(problem.row().encode())["shard"] == "x.tar"


def one_byte(path: Path) -> None:
    """Same size, same members, another picture."""
    data = bytearray(path.read_bytes())
    data[600] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "00001.tar").unlink(), r"00001\.tar is in manifest\.json, but not there"),
        (lambda folder: (folder / "00001.tar").write_bytes(b"x"), r"00001\.tar has 1 bytes, its manifest says .*: the shard changed"),
        (lambda folder: (folder / "00001.tar").rename(folder / "hidden"), r"00001\.tar is in manifest\.json, but not there"),
        (lambda folder: (folder / NAME).write_bytes(b"{"), r"manifest\.json is no shard manifest"),
        (
            lambda folder: (folder / NAME).write_text((folder / NAME).read_text().replace("00001.tar", "../1.tar")),
            r"no shard manifest: shards\.1",
        ),
    ],
)
def test_a_manifest_that_no_longer_fits_is_refused_before_any_work(tmp_path: Path, change: Callable[[Path], Any], said: str) -> None:
    small_split(tmp_path / "shards", "train")
    change(tmp_path / "shards/train")
    with pytest.raises(ValueError, match=said):
        train(recipe(tmp_path, data={"val_split": ""}))
    with pytest.raises(ValueError, match=said):
        stage.teach(teach_recipe(tmp_path / "shards", {"kind": "statistics"}))
    assert not (tmp_path / "runs/run/started.json").exists()


def test_a_shard_of_the_same_size_and_other_bytes_is_refused_where_it_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_score", score_here)
    small_split(tmp_path / "shards", "train")
    one_byte(tmp_path / "shards/train/00001.tar")
    with pytest.raises(ValueError, match=r"00001\.tar has sha256 \w+, its manifest says \w+: the shard changed"):
        stage.teach(teach_recipe(tmp_path / "shards", {"kind": "statistics"}))
    with pytest.raises(ValueError, match=r"00001\.tar has sha256 \w+, its manifest says \w+: the shard changed"):
        train(recipe(tmp_path, data={"val_split": ""}))


def test_a_shard_that_vanishes_while_it_is_read_is_an_error_with_its_name(tmp_path: Path) -> None:
    manifest = small_split(tmp_path, "train")
    pairs = Pairs(str(tmp_path / "train"), manifest, Plan.of(manifest, seed=0, batch=manifest.captions), inputs(), {})
    for path in (tmp_path / "train").glob("*.tar"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"0000\d\.tar"):
        pairs(Work(0, 0, 0))
    (tmp_path / "train/00000.tar").mkdir()  # there, but unreadable
    with pytest.raises(OSError, match=r"0000\d\.tar"):
        pairs(Work(0, 0, 0))


def test_clocks_that_disagree_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stage asks when a file was changed: stamps of 1970 and of 2100 leave a finished store finished."""
    monkeypatch.setattr(stage, "_score", score_here)
    monkeypatch.setattr(stage, "_tracked", lambda *a: nullcontext())
    small_split(tmp_path, "train")
    uri = Path(stage.teach(teach_recipe(tmp_path, {"kind": "statistics"}))["image"])
    stamps = [0, 4_102_444_800]
    for n, path in enumerate(sorted(p for p in tmp_path.rglob("*") if p.is_file())):
        os.utime(path, (stamps[n % 2], stamps[n % 2]))
    before = {p: p.stat().st_ino for p in uri.iterdir()}
    stage.teach(teach_recipe(tmp_path, {"kind": "statistics"}))
    assert {p: p.stat().st_ino for p in uri.iterdir()} == before
