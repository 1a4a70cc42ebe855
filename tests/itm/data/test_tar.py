"""The members of a tar: what tarfile finds, and what is truncated, corrupt or unsafe by name."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from itm.data import files
from itm.data.records import Problem
from itm.data.shards import Sample, read_samples
from itm.data.tar import Member, TarProblem, members
from tests.support.tars import pair, png, tar_of


def split(items) -> tuple[list[Sample], list[Problem]]:
    items = list(items)
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Problem)]


def parsed(data: bytes) -> tuple[list[Member | str], str]:
    """The members that come before the tar ends, and why it ends early."""
    found: list[Member | str] = []
    try:
        for member in members(memoryview(data)):
            found.append(member)
    except TarProblem as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("how", ["ustar", "gnu", "pax"])
def test_the_own_parser_agrees_with_tarfile_even_on_long_names(tmp_path, how):
    names = ["a.jpg", "folder/b.txt", f"{'d' * 60}/{'e' * 80}.jpg", "empty.txt"]
    if how != "ustar":
        names += [f"{'long' * 40}.jpg", f"{'é' * 120}.json"]
    formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    uri = tar_of(tmp_path / "x.tar", [(n, os.urandom(700) if n != "empty.txt" else b"") for n in names], format=formats[how])
    data = files.read_bytes(uri)
    with tarfile.open(uri) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    found = list(members(memoryview(data)))
    assert [(m.name, m.start, m.size) for m in found] == expected
    for member in found:  # every span is a tar of its own
        (alone,) = members(memoryview(data)[member.begin : member.end], fragment=True)
        assert isinstance(alone, Member)
        assert alone.name == member.name


def test_a_float_mtime_only_adds_pax_headers_that_are_skipped(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in pair("a", "one"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1234.5
            archive.addfile(info, io.BytesIO(data))
    (sample,), problems = split(read_samples(str(tmp_path / "x.tar")))
    assert (sample.key, problems) == ("a", [])


def test_corrupt_headers_compressed_tars_and_empty_files_are_problems_not_exceptions(tmp_path):
    uri = tar_of(tmp_path / "x.tar", pair("a", "one") + pair("b", "two"))
    data = bytearray(files.read_bytes(uri))
    data[2048 + 10] ^= 255
    for bad, reason in ((bytes(data), "corrupt header"), (b"\x1f\x8b" + bytes(1000), "compressed"), (b"", "truncated")):
        files.write_atomic(uri, bad)
        _, problems = split(read_samples(uri))
        assert any(reason in p.reason for p in problems)


def test_unsafe_names_and_links_are_left_out_by_name(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("/etc/a.jpg", "../b.jpg", "c/../../d.txt"):
            archive.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("e.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    samples, problems = split(read_samples(str(tmp_path / "x.tar")))
    assert not samples
    assert len(problems) == 4
    assert "link" in problems[3].reason


def test_a_member_whose_size_leads_backwards_ends_the_tar(tmp_path):
    """-1 is a valid octal number to `int`; a reader that believes it goes round for ever."""
    uri = tar_of(tmp_path / "x.tar", [*pair("a", "one"), ("b.png", png(2))])
    data = bytearray(Path(uri).read_bytes())
    at = data.index(b"b.png")
    data[at + 124 : at + 136] = b"-0000001000\0"
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    Path(uri).write_bytes(data)
    items = list(read_samples(uri))
    assert [i.key for i in items if isinstance(i, Sample)] == ["a"]
    assert any(isinstance(i, Problem) and "corrupt header" in i.reason for i in items)


def test_folders_carry_nothing_and_an_empty_tar_has_no_members(tmp_path):
    (tmp_path / "folder" / "empty").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_bytes(b"one")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "folder", "folder")
    (only,), problem = parsed((tmp_path / "x.tar").read_bytes())
    assert (only.name, only.size, problem) == ("folder/a.txt", 3, "")
    assert parsed(Path(tar_of(tmp_path / "none.tar", [])).read_bytes()) == ([], "")


def test_a_size_in_base_256_is_read_as_tarfile_reads_it(tmp_path):
    data = bytearray(Path(tar_of(tmp_path / "x.tar", [("a.bin", b"x" * 700), ("b.bin", b"y")])).read_bytes())
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive]
    found, problem = parsed(bytes(data))
    assert [(m.name, m.start, m.size) for m in found] == expected
    assert not problem


def test_what_stands_before_the_damage_is_given_before_it_is_told(tmp_path):
    data = Path(tar_of(tmp_path / "x.tar", [("a.bin", b"x" * 100), ("b.bin", b"y" * 100)])).read_bytes()
    for end, names, why in ((1024, ["a.bin"], "no end-of-archive mark"), (1600, ["a.bin"], "needs"), (512, [], "needs")):
        found, problem = parsed(data[:end])
        assert [m.name for m in found] == names
        assert why in problem
