"""Manifests and receipts: what they promise is checked in one listing, and each fault is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from itm.data.manifest import (
    Manifest,
    Receipt,
    ShardInfo,
    check_present,
    list_shards,
    read_receipt,
    receipt_uri,
    write_manifest,
    write_receipt,
)
from itm.data.records import Problem
from itm.data.shards import index_shard, read_manifest, write_shard
from tests.support.tars import records


def written(folder: Path, counts: tuple[int, ...] = (3, 2)) -> Manifest:
    shards = [write_shard(str(folder / f"{n:05d}.tar"), records(count)) for n, count in enumerate(counts)]
    manifest = Manifest(split=folder.name, source="test", shards=shards, rejected=1)
    write_manifest(str(folder), manifest)
    return manifest


def test_a_manifest_fingerprint_follows_the_content(tmp_path):
    for name, n in (("a", 3), ("b", 3), ("c", 2)):
        write_shard(str(tmp_path / name / "0.tar"), records(n))
    a, b, c = (read_manifest(str(tmp_path / name)).fingerprint() for name in "abc")
    assert a == b != c
    with pytest.raises(ValueError, match="run `itm pack`"):
        read_manifest(str(tmp_path / "none"))


def test_what_is_written_is_read_back_and_counts_are_those_of_the_files(tmp_path):
    manifest = written(tmp_path / "train")
    assert read_manifest(str(tmp_path / "train")) == manifest
    assert (manifest.samples, manifest.captions, manifest.rejected) == (5, 6 + 3, 1)
    for shard in manifest.shards:
        data = (tmp_path / "train" / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_shards_come_in_natural_order_and_none_is_a_named_error(tmp_path):
    for name in ("10.tar", "9.tar", "a2.tar", "a10.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [Path(uri).name for uri in list_shards(str(tmp_path))] == ["9.tar", "10.tar", "a2.tar", "a10.tar"]
    (tmp_path / "nshards.txt").write_text("four")
    with pytest.raises(ValueError, match=r"nshards\.txt must hold the number of tars, not b'four'"):
        list_shards(str(tmp_path))
    with pytest.raises(ValueError, match="no manifest.json and no .tar"):
        list_shards(str(tmp_path / "none"))


def test_a_shard_that_is_missing_or_of_another_size_is_named(tmp_path):
    manifest = written(tmp_path)
    check_present(str(tmp_path), manifest)
    second = tmp_path / "00001.tar"
    second.write_bytes(second.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"00001\.tar has [\d,]+ bytes, its manifest says"):
        check_present(str(tmp_path), manifest)
    second.unlink()
    with pytest.raises(ValueError, match=r"00001\.tar is in manifest\.json, but not there"):
        check_present(str(tmp_path), manifest)


def test_a_shard_listed_twice_and_a_name_outside_the_folder_are_refused():
    shard = ShardInfo(name="0.tar", samples=1, captions=1, bytes=1, sha256="a")
    with pytest.raises(ValueError, match="a shard is listed twice"):
        Manifest(split="train", source="t", shards=[shard, shard])
    with pytest.raises(ValueError, match="name"):
        ShardInfo(name="../0.tar", samples=1, captions=1, bytes=1, sha256="a")


def test_a_receipt_counts_samples_lost_and_holds_only_for_the_bytes_it_was_written_for(tmp_path):
    uri = str(tmp_path / "0.tar")
    info = write_shard(uri, records())
    rows = [(row.key, row.captions, row.start, row.end) for row in index_shard(uri)]
    problems = [Problem("a", "0.tar", "pack", "broken"), Problem("b", "0.tar", "pack", "empty", "caption")]
    receipt = Receipt(info=info, made_from="f", rows=rows, problems=problems)
    assert receipt.rejected == 1
    assert read_receipt(uri) is None
    write_receipt(uri, receipt)
    assert json.loads(Path(receipt_uri(uri)).read_text())["rows"] == [list(row) for row in rows]
    assert read_receipt(uri) == receipt
    Path(uri).write_bytes(b"shorter")
    assert read_receipt(uri) is None
