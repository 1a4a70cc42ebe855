"""Repair: what can be used is copied byte for byte, what cannot is named, and the copy is a folder like any packed one."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from itm.data.manifest import Manifest
from itm.data.records import Problem, Regions
from itm.data.same_image import image_of
from itm.data.shards import Sample, read_manifest, read_samples
from pipelines.cli import stage_main
from pipelines.inspect import inspect
from pipelines.repair import repair
from tests.support.tars import png, tar_of

GOOD = Regions(np.ones((2, 4), np.float16), np.ones((2, 4), np.float32), 8, 8).to_npz()


def bad_regions() -> bytes:
    out = io.BytesIO()
    np.savez(out, features=np.full((2, 4), np.nan, np.float32))
    return out.getvalue()


def said(*texts: str) -> bytes:
    return json.dumps({"captions": list(texts), "source": "s"}).encode()


def foreign(folder: Path) -> Path:
    """Two tars with every kind of damage between good samples."""
    folder.mkdir(parents=True)
    scattered = [("a.png", png(1)), ("b.png", png(2)), ("b.json", said("bee")), ("a.json", said("ay", " "))]
    more = [("x/c.png", b"no image"), ("x/c.regions.npz", GOOD), ("x/c.json", said("see")), ("d.png", png(4)[:90]), ("d.json", said("dee"))]
    tar_of(folder / "0.tar", [*scattered, *more, ("b.json", said("other")), ("e.png", png(5))])
    rest = [("a.png", png(9)), ("a.json", said("again")), ("f.png", png(6)), ("f.regions.npz", bad_regions()), ("f.json", said("eff"))]
    tar_of(folder / "1.tar", [*rest, ("h.png", png(8)), ("h.json", said("x" * 30_000))])
    with tarfile.open(folder / "1.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("../g.png"))
        link = tarfile.TarInfo("i.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    cut = folder / "2.tar"
    tar_of(cut, [("j.png", png(10)), ("j.json", said("jay")), ("k.png", png(11)), ("k.json", said("kay"))])
    cut.write_bytes(cut.read_bytes()[:4620])
    return folder


def samples(folder: Path, manifest: Manifest) -> dict[str, Sample]:
    found = [item for shard in manifest.shards for item in read_samples(str(folder / shard.name))]
    assert not [item for item in found if isinstance(item, Problem)]
    return {item.key: item for item in found if isinstance(item, Sample)}


def test_a_damaged_folder_becomes_a_clean_one_and_everything_left_out_is_named(tmp_path: Path) -> None:
    source, clean = foreign(tmp_path / "foreign"), tmp_path / "clean"
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    manifest = repair(str(source), str(clean))
    found = samples(clean, manifest)
    assert {key: [c.text for c in s.captions] for key, s in found.items()} == {
        "a": ["ay"],
        "b": ["bee"],
        "x_c": ["see"],
        "1_a": ["again"],
        "f": ["eff"],
        "j": ["jay"],
    }
    assert (found["a"].image, found["b"].image, found["f"].image) == (png(1), png(2), png(6))
    assert (found["x_c"].image, found["x_c"].regions, found["f"].regions) == (None, GOOD, None)
    assert found["a"].meta["source"] == "s"
    rows = [json.loads(line) for line in (clean / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((r["key"], r["shard"], r["what"]) for r in rows) == [
        ("", "1.tar", "shard"),
        ("", "1.tar", "shard"),
        ("", "2.tar", "shard"),
        ("a", "0.tar", "caption"),
        ("b", "0.tar", "member"),
        ("d", "0.tar", "sample"),
        ("e", "0.tar", "sample"),
        ("f", "1.tar", "member"),
        ("h", "1.tar", "sample"),
        ("k", "2.tar", "sample"),
        ("x_c", "0.tar", "member"),
    ]
    # distinct keys of each tar: 5 (a b c d e), 4 (a f h; g and i are no files), 2 (j k)
    assert manifest.samples + manifest.rejected == 5 + 3 + 2
    assert (found["1_a"].image, found["1_a"].meta["image_id"]) == (png(9), "1_a")
    assert manifest.rejected == sum(r["what"] == "sample" for r in rows)
    assert inspect(str(clean)).problems == []
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_repairing_again_or_after_a_crash_gives_the_same_bytes(tmp_path: Path) -> None:
    source, clean = foreign(tmp_path / "foreign"), tmp_path / "clean"
    repair(str(source), str(clean))
    whole = {p.name: p.read_bytes() for p in clean.iterdir()}
    kept = (clean / "0.tar").stat().st_mtime_ns
    for gone in ("manifest.json", "1.tar", "2.index.json"):
        (clean / gone).unlink()
    repair(str(source), str(clean))
    assert {p.name: p.read_bytes() for p in clean.iterdir()} == whole
    assert (clean / "0.tar").stat().st_mtime_ns == kept


def test_a_clean_copy_of_a_packed_split_has_its_samples(tmp_path: Path) -> None:
    from tests.support.noise_split import small_split

    before = small_split(tmp_path / "shards", regions=True)
    after = repair(str(tmp_path / "shards/train"), str(tmp_path / "clean/train"))
    assert [(s.samples, s.captions) for s in after.shards] == [(s.samples, s.captions) for s in before.shards]
    for ours, theirs in zip(
        samples(tmp_path / "clean/train", after).values(), samples(tmp_path / "shards/train", before).values(), strict=True
    ):
        assert (ours.key, ours.image, ours.regions, ours.captions) == (theirs.key, theirs.image, theirs.regions, theirs.captions)
    assert read_manifest(str(tmp_path / "clean/train")) == after


def test_the_command_refuses_to_write_over_others_and_says_how_much_it_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = foreign(tmp_path / "foreign")
    assert stage_main("repair", [str(source), "--output", str(source)]) == 2
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/0.tar").write_bytes(b"precious")
    assert stage_main("repair", [str(source), "--output", str(tmp_path / "theirs")]) == 2
    assert (tmp_path / "theirs/0.tar").read_bytes() == b"precious"
    assert stage_main("repair", [str(tmp_path), "--output", str(tmp_path / "out")]) == 2, "theirs holds nothing usable"
    assert stage_main("repair", [str(source), "--output", str(tmp_path / "clean")]) == 0
    told = capsys.readouterr()
    assert "must be another folder" in told.err and "were not made by `itm repair`" in told.err and "not one sample" in told.err
    assert "6 images, 6 captions in 3 shards, 4 rejected" in told.out


def test_field_case_18_keys_that_restart_in_each_shard_lose_nothing_and_get_the_name_of_their_shard(tmp_path: Path) -> None:
    source, clean = tmp_path / "foreign", tmp_path / "clean"
    source.mkdir()
    for shard in range(3):  # the last image of each shard is the first of the next
        members = [
            (f"{n:06d}.{end}", data)
            for n in range(3)
            for end, data in (("png", png(2 * shard + n)), ("txt", f"caption {shard} {n}".encode()))
        ]
        tar_of(source / f"{shard:05d}.tar", members)
    manifest = repair(str(source), str(clean))
    found = samples(clean, manifest)
    assert (manifest.samples, manifest.captions, manifest.rejected) == (9, 9, 0)
    assert list(found) == [*(f"{n:06d}" for n in range(3)), *(f"{shard:05d}_{n:06d}" for shard in (1, 2) for n in range(3))]
    assert len({image_of(sample) for sample in found.values()}) == 7, "copies of an image stay one image"
    whole = {p.name: p.read_bytes() for p in clean.iterdir()}
    (clean / "00002.tar").unlink()
    repair(str(source), str(clean))
    assert {p.name: p.read_bytes() for p in clean.iterdir()} == whole
