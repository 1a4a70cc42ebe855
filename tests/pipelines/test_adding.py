"""Photos that are added to a packed source: old shards keep their bytes, new ones follow, and what is no longer as it was is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from itm.config import Recipe
from itm.data.formats import Json
from itm.data.shards import Sample, read_samples
from pipelines import pack as packing
from tests.support.packing_here import pack_here, recipe
from tests.support.registry_world import picture

Names = list[str]


def captioned(names: Names) -> list[tuple[str, str]]:
    return [(name, f"{name[:-4]} {n}") for name in names for n in range(2)]


def as_folder(at: Path, names: Names) -> Json:
    for name in names:
        (at / name).with_suffix(".txt").write_text("\n".join(text for of, text in captioned([name])))
    return {"path": str(at)}


def as_csv(at: Path, names: Names) -> Json:
    (at.parent / "t.csv").write_text("image,caption\n" + "".join(f"{name},{text}\n" for name, text in captioned(names)))
    return {"path": str(at.parent / "t.csv"), "image_root": str(at)}


def as_pairs(at: Path, names: Names) -> Json:
    (at.parent / "t.json").write_text(json.dumps([{"image": name, "caption": text} for name, text in captioned(names)]))
    return {"path": str(at.parent / "t.json"), "image_root": str(at)}


def as_coco(at: Path, names: Names) -> Json:
    images = [{"id": int(name[1:3]), "file_name": name} for name in names]
    rows = [{"id": text, "image_id": int(name[1:3]), "caption": text} for name, text in captioned(names)]
    (at.parent / "t.json").write_text(json.dumps({"images": images, "annotations": rows}))
    return {"path": str(at.parent / "t.json"), "image_root": str(at)}


def as_karpathy(at: Path, names: Names) -> Json:
    said = lambda name: [{"raw": text, "sentid": f"{name}/{n}"} for n, (_, text) in enumerate(captioned([name]))]
    images = [{"filename": name, "split": "train", "imgid": int(name[1:3]), "sentences": said(name)} for name in names]
    (at.parent / "t.json").write_text(json.dumps({"images": images}))
    return {"path": str(at.parent / "t.json"), "image_root": str(at)}


def as_parquet(at: Path, names: Names) -> Json:
    rows = [{"image": {"bytes": (at / name).read_bytes(), "path": name}, "caption": text} for name, text in captioned(names)]
    pq.write_table(pa.Table.from_pylist(rows), at.parent / "t.parquet")
    return {"path": str(at.parent / "t.parquet")}


WRITERS: dict[str, Callable[[Path, Names], Json]] = {
    "imagefolder": as_folder,
    "csv": as_csv,
    "pairs_json": as_pairs,
    "coco_captions": as_coco,
    "karpathy": as_karpathy,
    "parquet": as_parquet,
}
OLD = [f"p{n:02d}.png" for n in range(10, 15)]  # two shards, the second of one
NEW = ["p05.png", *OLD, "p70.png"]  # before and behind the old ones


def photos(at: Path, names: Names) -> Path:
    at.mkdir(parents=True, exist_ok=True)
    for name in names:
        (at / name).write_bytes(picture(["red", "blue", "green", "black"][int(name[1:3]) % 4]) + name.encode())
    return at


def bytes_of(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}


def packed_names(folder: Path) -> list[tuple[str, list[str]]]:
    samples = [s for shard in sorted(folder.glob("*.tar")) for s in read_samples(str(shard)) if isinstance(s, Sample)]
    return [(s.key, [c.text for c in s.captions]) for s in samples]


def two_packings(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, dict[str, bytes]]:
    """A packed source to which two images were added since; what the first packing wrote."""
    at, write = photos(tmp_path / "photos", OLD), WRITERS[kind]
    pack_here(recipe(tmp_path / "shards", kind, write(at, OLD)), monkeypatch)
    before = bytes_of(tmp_path / "shards" / "train", "0*")
    names = NEW if kind != "parquet" else [*OLD, "p05.png", "p70.png"]  # a row is known by its number
    return recipe(tmp_path / "shards", kind, write(photos(at, names), names)), before


@pytest.mark.parametrize("kind", WRITERS)
def test_old_shards_keep_their_bytes_and_what_was_added_is_behind_them(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices, before = two_packings(tmp_path, kind, monkeypatch)
    manifest = pack_here(choices, monkeypatch)["train"]
    train = tmp_path / "shards" / "train"
    after = bytes_of(train, "0*")
    assert {name: after[name] for name in before} == before
    assert sorted(set(after) - set(before)) == ["00002.index.json", "00002.tar"]
    assert [s.samples for s in manifest.shards] == [4, 1, 2]
    assert [texts for _, texts in packed_names(train)] == [[t for _, t in captioned([n])] for n in [*OLD, "p05.png", "p70.png"]]
    assert packing.packed(choices) == {"train": manifest}
    everything = bytes_of(train)
    pack_here(choices, monkeypatch)
    assert bytes_of(train) == everything


def test_an_adding_that_was_stopped_ends_in_the_same_bytes_and_readers_have_the_old_split_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices, before = two_packings(tmp_path, "csv", monkeypatch)
    train = tmp_path / "shards" / "train"
    old = (train / "manifest.json").read_bytes()
    for name in ("pack_shard", "write_manifest"):  # before the new shard, and behind it
        with monkeypatch.context() as patch:
            patch.setattr(packing, name, lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pack_here(choices, monkeypatch)
        assert (train / "manifest.json").read_bytes() == old
        assert packing.packed(choices) is None
    pack_here(choices, monkeypatch)
    unbroken, _ = two_packings(tmp_path / "unbroken", "csv", monkeypatch)
    pack_here(unbroken, monkeypatch)
    assert bytes_of(train, "*.tar") == bytes_of(tmp_path / "unbroken" / "shards" / "train", "*.tar")
    assert {name: bytes_of(train)[name] for name in before} == before


def test_more_is_added_twice_and_a_new_photo_of_a_stem_that_is_taken_has_a_key_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = tmp_path / "photos"
    photos(at / "b", OLD)
    choices = recipe(tmp_path / "shards", "imagefolder", {"path": str(at)})
    pack_here(choices, monkeypatch)
    before = bytes_of(tmp_path / "shards" / "train", "0*")
    photos(at / "a", ["p11.png"])
    pack_here(choices, monkeypatch)
    photos(at / "c", ["p11.png", "p99.png"])
    manifest = pack_here(choices, monkeypatch)["train"]
    after = bytes_of(tmp_path / "shards" / "train", "0*")
    assert {name: after[name] for name in before} == before
    assert [s.samples for s in manifest.shards] == [4, 1, 1, 2]
    assert [key for key, _ in packed_names(tmp_path / "shards" / "train")][5:] == ["p11-2", "c_p11", "p99"]


def test_what_was_taken_away_or_changed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = photos(tmp_path / "photos", OLD)
    choices = recipe(tmp_path / "shards", "imagefolder", as_folder(at, OLD))
    pack_here(choices, monkeypatch)
    before = bytes_of(tmp_path / "shards" / "train")
    as_folder(photos(at, NEW), NEW)
    (at / OLD[1]).unlink()
    (at / OLD[2]).with_suffix(".txt").write_text("another caption")
    with pytest.raises(ValueError, match=r"p11\.png is gone; p12\.png is changed\. .*--overwrite"):
        pack_here(choices, monkeypatch)
    assert bytes_of(tmp_path / "shards" / "train") == before
    assert pack_here(choices, monkeypatch, overwrite=True)["train"].samples == 6


def test_other_choices_are_named_and_what_was_rejected_stays_so_until_it_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = photos(tmp_path / "photos", OLD)
    options = {"path": str(at)}
    (at / OLD[0]).write_bytes(b"no image")
    pack_here(recipe(tmp_path / "shards", "imagefolder", options), monkeypatch)
    photos(at, NEW[-1:])
    with pytest.raises(ValueError, match=r"other choices \(shard_samples was 4, is 3\)"):
        pack_here(recipe(tmp_path / "shards", "imagefolder", options, shard_samples=3), monkeypatch)
    manifest = pack_here(recipe(tmp_path / "shards", "imagefolder", options), monkeypatch)["train"]
    assert (manifest.samples, manifest.rejected) == (5, 1)
    photos(at, ["p71.png", OLD[0]])
    with pytest.raises(ValueError, match="p10, which was rejected, can be read now"):
        pack_here(recipe(tmp_path / "shards", "imagefolder", options), monkeypatch)
