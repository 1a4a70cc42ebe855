"""Files by URI: one way for local paths and any filesystem, and no file that is half there."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from itm.data import files
from itm.data.shards import read_manifest, read_range, scan_shard, write_shard
from tests.support.tars import records


def test_files_are_replaced_as_a_whole_or_not_at_all(tmp_path):
    uri = files.join(tmp_path, "deep", "x.bin")
    files.write_atomic(uri, b"old")
    with contextlib.suppress(RuntimeError), files.atomic_stream(uri) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert files.read_bytes(uri) == b"old"
    assert files.list_files(tmp_path / "deep") == [uri]
    assert files.read_span(uri, 1, 3) == b"ld"
    with files.local_copy(tmp_path / "deep") as local:
        assert local == tmp_path / "deep"


def test_any_fsspec_filesystem_holds_shards(tmp_path):
    uri = "memory://bucket/train/00000.tar"
    info = write_shard(uri, records())
    assert info == write_shard(str(tmp_path / "00000.tar"), records())
    manifest = read_manifest("memory://bucket/train")
    assert manifest.shards == [info]
    row = scan_shard(uri)[0][2]
    assert read_range(uri, row.start, row.end).key == "k2"
    with files.local_copy("memory://bucket/train") as local:
        assert (local / "00000.tar").read_bytes() == files.read_bytes(uri)
    assert not local.exists()


def test_half_written_files_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    names = {
        "dead": f"a.tar.tmp-{host}-{dead.pid}-01234567",
        "mine": f"b.tar.tmp-{host}-{os.getpid()}-01234567",
        "theirs": "c.tar.tmp-other-7-01234567",
        "old": "d.tar.tmp-other-7-89abcdef",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"half")
    hour_ago = time.time() - 4000
    os.utime(tmp_path / names["old"], (hour_ago, hour_ago))
    assert files.list_files(tmp_path) == []
    files.remove_abandoned(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([names["mine"], names["theirs"]])
    assert files.remove_abandoned(tmp_path / "none") == []


def test_names_are_joined_and_taken_apart_whatever_the_scheme():
    for folder in ("/a/b", "/a/b/", "s3://bucket/a", "memory://x", "relative"):
        assert files.join(folder, "c", "d.tar") == f"{folder.rstrip('/')}/c/d.tar"
        assert files.name_of(files.join(folder, "c", "d.tar")) == "d.tar"
    assert files.join("/", "a") == "/a"
    assert files.name_of("s3://bucket/a/") == "a"


def test_a_folder_is_listed_in_order_without_what_lies_deeper_or_is_half_written(tmp_path):
    for name in ("b.tar", "a.tar", "c.json", "deep/d.tar", files.temporary("e.tar")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert files.list_files(tmp_path, ".tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert files.sizes(tmp_path) == {name: os.path.getsize(tmp_path / name) for name in ("a.tar", "b.tar", "c.json")}
    assert files.list_folders(tmp_path) == [f"{tmp_path}/deep"]
    assert files.list_files(tmp_path / "none") == files.list_folders(tmp_path / "none") == []


def test_what_is_not_there_or_no_filesystem_is_told_by_name(tmp_path):
    for read in (files.read_bytes, files.size_of, files.read_view):
        with pytest.raises(FileNotFoundError, match="none"):
            read(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="nothing at .*none"), files.local_copy(tmp_path / "none"):
        pass
    with pytest.raises(ValueError, match="cannot open nosuch://x/y"):
        files.exists("nosuch://x/y")


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(ValueError, match=r"cannot write below .*file/out: .*choose another folder"):
        files.check_writable(tmp_path / "file" / "out")
    files.check_writable(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_a_write_that_fails_names_its_file_and_leaves_none(tmp_path):
    (tmp_path / "x.bin").mkdir()
    with pytest.raises(OSError, match=r"x\.bin"):
        files.write_atomic(tmp_path / "x.bin", b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
