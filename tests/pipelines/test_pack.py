"""Packing: deterministic shards, nothing lost silently, a rerun does nothing, and errors come before the work."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from itm.config import Part, Recipe, parse_recipe
from itm.data import files
from itm.data.shards import index_shard, read_manifest, read_samples
from itm.data.sources.scenes import Scenes
from itm.tracking.runs import client
from pipelines import inspect
from pipelines.pack import Job, pack, pack_shard


@pytest.fixture(autouse=True, scope="module")
def _tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One database for the module: making its tables takes longer than a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


def recipe(root: Path, kind: str = "scenes", options: dict | None = None, **data) -> Recipe:
    options = {"world": "tiny", "n_train": 12, "n_val": 4, "n_test": 4} if options is None else options
    section = {"source": {"kind": kind, "options": options}, "root": str(root), "shard_samples": 5, **data}
    return parse_recipe({"name": "t", "data": section, "model": {"kind": "dual"}})


def bytes_below(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def photos_with_faults(folder: Path) -> Recipe:
    """Ten images: one corrupt, one missing, one with only an empty caption, one with one empty caption of two."""
    good = next(Scenes("tiny").records("train")).image
    rows = []
    for n in range(10):
        (folder / f"{n}.png").write_bytes(good[: len(good) // 2] if n == 3 else good)
        rows += [{"image": f"{n}.png", "caption": f"caption {n}\n", "image_id": n}]
    (folder / "4.png").unlink()
    rows[5]["caption"] = "  "
    rows.append({"image": "6.png", "caption": "", "image_id": 6})
    (folder / "pairs.json").write_text(json.dumps(rows))
    return recipe(
        folder / "out", "pairs_json", {"path": {"train": str(folder / "pairs.json")}, "image_root": str(folder)}, max_reject_rate=0.5
    )


def test_a_shard_accounts_for_every_item_of_its_slice(tmp_path):
    source = photos_with_faults(tmp_path).data.source
    receipt = json.loads(pack_shard(Job(source, "train", "pixels", "f", str(tmp_path / "00000.tar"), 0, 10)))
    assert [row[0] for row in receipt["rows"]] == ["0", "1", "2", "6", "7", "8", "9"]
    assert [(p["key"], p["shard"], p["stage"], p["what"]) for p in receipt["problems"]] == [
        ("3", "00000.tar", "pack", "sample"),
        ("4", "00000.tar", "source", "sample"),
        ("5", "00000.tar", "pack", "caption"),
        ("5", "00000.tar", "pack", "sample"),
        ("6", "00000.tar", "pack", "caption"),
    ]
    assert "cannot be decoded" in receipt["problems"][0]["reason"]
    sample = next(read_samples(str(tmp_path / "00000.tar")))
    assert sample.captions[0].text == "caption 0"
    assert [(r.key, r.captions, r.start, r.end) for r in index_shard(str(tmp_path / "00000.tar"))] == [tuple(r) for r in receipt["rows"]]


def test_a_recipe_that_wants_regions_says_so_for_a_source_without(tmp_path):
    source = Part(kind="scenes", options={"world": "tiny"})
    receipt = json.loads(pack_shard(Job(source, "train", "regions", "f", str(tmp_path / "0.tar"), 0, 2)))
    assert not receipt["rows"]
    assert "regions: true" in receipt["problems"][0]["reason"]


def test_an_unwritable_output_or_an_unknown_choice_is_an_error_before_the_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write below"):
        pack(recipe(tmp_path / "file" / "out"))
    with pytest.raises(ValueError, match="did you mean 'world'"):
        pack(recipe(tmp_path / "out", options={"worlds": "tiny"}))
    with pytest.raises(ValueError, match="no split dev"):
        pack(recipe(tmp_path / "out"), splits=["dev"])
    with pytest.raises(ValueError, match=r"data\.source is not set"):
        pack(parse_recipe({"name": "t", "model": {"kind": "dual"}}))
    (tmp_path / "theirs" / "train").mkdir(parents=True)
    (tmp_path / "theirs" / "train" / "00000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="did not make"):
        pack(recipe(tmp_path / "theirs"))
    assert (tmp_path / "theirs" / "train" / "00000.tar").read_bytes() == b"precious"


@pytest.mark.e2e
def test_packing_twice_does_nothing_and_after_a_crash_ends_in_the_same_bytes(tmp_path, ray_local):
    manifests = pack(recipe(tmp_path / "a"))
    door = client()
    runs = door.search_runs([door.get_experiment_by_name("itm").experiment_id])
    flow = {r.data.params["split"]: [r.data.metrics[f"rows_{way}"] for way in ("in", "out", "rejected")] for r in runs}
    assert flow == {"train": [12, 12, 0], "val": [4, 4, 0], "test": [4, 4, 0]}
    assert {s: (m.samples, m.captions, len(m.shards)) for s, m in manifests.items()} == {
        "train": (12, 60, 3),
        "val": (4, 20, 1),
        "test": (4, 20, 1),
    }
    keys = [s.key for n in range(3) for s in read_samples(str(tmp_path / "a" / "train" / f"{n:05d}.tar"))]
    assert keys == [r.key for r in Scenes("tiny", n_train=12).records("train")]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert pack(recipe(tmp_path / "a")) == manifests
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file()} == before
    pack(recipe(tmp_path / "b"))
    train = tmp_path / "b" / "train"
    (train / "manifest.json").unlink()
    (train / "00002.index.json").unlink()
    (train / "00001.tar").write_bytes(b"half")
    kept = (train / "00000.tar").stat().st_mtime_ns
    pack(recipe(tmp_path / "b"))
    assert (train / "00000.tar").stat().st_mtime_ns == kept
    assert bytes_below(tmp_path / "a") == bytes_below(tmp_path / "b")


@pytest.mark.e2e
def test_other_choices_are_refused_until_told_to_overwrite(tmp_path, ray_local):
    first = pack(recipe(tmp_path / "out"), splits=["val"])["val"]
    other = recipe(tmp_path / "out", options={"world": "tiny", "seed": 1, "n_val": 6})
    with pytest.raises(ValueError, match="--overwrite"):
        pack(other, splits=["val"])
    assert read_manifest(str(tmp_path / "out" / "val")) == first
    second = pack(other, overwrite=True, splits=["val"])["val"]
    assert second.samples == 6
    assert second.fingerprint() != first.fingerprint()


@pytest.mark.e2e
def test_rejected_samples_are_in_the_quarantine_and_too_many_fail_the_stage(tmp_path, ray_local):
    choices = photos_with_faults(tmp_path)
    strict = parse_recipe(choices.model_dump() | {"data": choices.data.model_dump() | {"max_reject_rate": 0.29}})
    with pytest.raises(ValueError, match=r"3 of 10 samples rejected, more than data\.max_reject_rate=0\.29; the first: 3: image cannot"):
        pack(strict)
    assert not files.exists(tmp_path / "out" / "train" / "manifest.json")
    (tmp_path / "4.png").write_bytes((tmp_path / "0.png").read_bytes())  # mended since
    manifest = pack(choices)["train"]
    assert (manifest.samples, manifest.captions, manifest.rejected) == (8, 8, 2)
    rows = [json.loads(line) for line in (tmp_path / "out" / "train" / "quarantine.jsonl").read_text().splitlines()]
    assert [(r["key"], r["what"]) for r in rows] == [("3", "sample"), ("5", "caption"), ("5", "sample"), ("6", "caption")]
    before = bytes_below(tmp_path / "out")
    pack(choices)
    assert bytes_below(tmp_path / "out") == before


def test_inspect_counts_what_is_there_and_names_what_is_wrong(tmp_path, capsys):
    source = Part(kind="scenes", options={"world": "tiny", "regions": True})
    for n in range(2):
        pack_shard(Job(source, "val", "regions", "f", str(tmp_path / "val" / f"{n:05d}.tar"), 5 * n, 5 * n + 5))
        files.delete(tmp_path / "val" / f"{n:05d}.index.json")
    asked = argparse.Namespace(uri=str(tmp_path), index=True)
    assert inspect.run(asked) == 0
    told = capsys.readouterr().out
    for words in (
        "samples   10",
        "captions  50; per image least / mean / most: 5 / 5.00 / 5",
        ".regions.npz",
        "64-64 x 64-64",
        "problems  0",
    ):
        assert words in told
    assert read_manifest(str(tmp_path / "val")).samples == 10
    assert files.exists(tmp_path / "val" / "00001.index.json")
    damaged = tmp_path / "val" / "00001.tar"
    damaged.write_bytes(damaged.read_bytes()[:30_000])
    assert inspect.run(asked) == 1
    told = capsys.readouterr().out
    assert "truncated" in told
    assert "differs from the manifest" in told
    with pytest.raises(ValueError, match=r"no \.tar"):
        inspect.run(argparse.Namespace(uri=str(tmp_path / "nothing"), index=False))
