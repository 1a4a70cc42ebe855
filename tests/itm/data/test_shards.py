"""Tar shards: what is written reads back, agrees with tarfile and webdataset, and bad content becomes a named problem."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from itm.data import files, shards
from itm.data.records import Caption, Problem, Record, Regions, check_image
from itm.data.shards import Sample, index_shard, parse_range, read_manifest, read_range, read_samples, write_shard
from tests.support.tars import pair, png, records, tar_of


def split(items) -> tuple[list[Sample], list[Problem]]:
    items = list(items)
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Problem)]


def test_a_written_shard_reads_back_field_by_field(tmp_path):
    uri = str(tmp_path / "00000.tar")
    info = write_shard(uri, records())
    assert (info.samples, info.captions, info.bytes) == (3, 6, os.path.getsize(uri))
    samples, problems = split(read_samples(uri))
    assert not problems
    for sample, record in zip(samples, records(), strict=True):
        assert (sample.key, sample.image, sample.captions) == (record.key, record.image, record.captions)
        assert sample.meta == {"image_id": record.meta["image_id"], "split": "train"}
        regions = Regions.from_npz(sample.regions)
        assert np.array_equal(regions.features, record.regions.features)
        assert (regions.width, regions.height, regions.boxes.shape) == (64, 48, (2, 4))


def test_the_quick_way_to_a_sample_never_gives_another_one_than_the_whole_parser_whatever_byte_is_wrong(tmp_path, monkeypatch):
    uri = str(tmp_path / "00000.tar")
    odd = [Caption("c", " "), Caption("d", "naïve"), Caption("e", "a dog", {"logic": [1]}), Caption("f", "\ud800")]
    write_shard(uri, [*records(), Record("plain", "train", odd[1:3], png())])
    rng, given = np.random.default_rng(0), []
    for place in index_shard(uri):
        data = files.read_span(uri, place.start, place.end)
        given.append(data)
        for at in [*range(0, 300), *rng.integers(0, len(data), 200)]:
            given.append(data[:at] + bytes([rng.integers(256)]) + data[at + 1 :])
    texts = [caption.text for caption in odd]
    held = (
        [("a/x.JPG", png()), ("a/x.json", json.dumps({"captions": texts}).encode())],
        pair("x", *texts),
        [*pair("x", "y"), *pair("z", "y")],
    )
    given += [Path(tar_of(tmp_path / "foreign.tar", members)).read_bytes()[:-1024] for members in held] + [b"", bytes(512)]

    def outcome(data: bytes) -> object:
        try:
            return vars(parse_range(data, uri, 0))
        except ValueError as error:
            return str(error)

    quick = [outcome(data) for data in given]
    monkeypatch.setattr(shards, "plain_files", lambda data: None)
    assert quick == [outcome(data) for data in given]
    assert sum(isinstance(found, dict) for found in quick) > 100 < sum(isinstance(found, str) for found in quick)


def test_the_same_records_give_the_same_bytes_in_plain_ustar(tmp_path):
    first, second = (write_shard(str(tmp_path / f"{n}" / "x.tar"), records()) for n in "ab")
    assert first == second
    with tarfile.open(tmp_path / "a" / "x.tar") as archive:
        assert {(m.mtime, m.uid, m.gid, len(m.pax_headers)) for m in archive} == {(0, 0, 0, 0)}


def test_webdataset_reads_our_shards(tmp_path):
    import webdataset

    write_shard(str(tmp_path / "x.tar"), records())
    rows = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    assert [row["__key__"] for row in rows] == ["k0", "k1", "k2"]
    assert rows[1]["png"] == png(1)
    assert [c["text"] for c in json.loads(rows[1]["json"])["captions"]] == ["caption 0 é", "caption 1 é"]


def test_byte_ranges_of_the_index_hold_exactly_their_samples(tmp_path):
    uri = str(tmp_path / "x.tar")
    write_shard(uri, records())
    samples, _ = split(read_samples(uri))
    index = index_shard(uri)
    assert [(row.key, row.captions) for row in index] == [("k0", 1), ("k1", 2), ("k2", 3)]
    for row, sample in zip(index, samples, strict=True):
        alone = read_range(uri, row.start, row.end)
        assert (alone.key, alone.image, alone.captions, alone.regions) == (sample.key, sample.image, sample.captions, sample.regions)
    with pytest.raises(ValueError, match="changed after it was indexed"):
        read_range(uri, index[0].start + 512, index[0].end)


def test_img2dataset_and_clip_benchmark_layouts_are_read_as_they_are(tmp_path):
    contents = [
        ("s0.jpg", b"x"), ("s0.txt", b"first\nsecond"),
        ("s1.jpg", b"x"), ("s1.txt", b"from txt"), ("s1.json", json.dumps({"caption": "from json", "url": "u"}).encode()),
        ("s2.jpg", b"x"), ("s2.json", json.dumps({"caption": "alone"}).encode()),
        ("s3.jpg", b"x"), ("s3.txt", b"from txt"), ("s3.json", json.dumps({"captions": ["list", "wins"]}).encode()),
    ]  # fmt: skip
    folder = tmp_path / "train"
    folder.mkdir()
    tar_of(folder / "10.tar", contents[:2])
    tar_of(folder / "2.tar", contents[2:])
    (folder / "nshards.txt").write_text("2")
    manifest = read_manifest(str(folder))
    assert [s.name for s in manifest.shards] == ["2.tar", "10.tar"]
    assert (manifest.samples, manifest.captions, manifest.rejected) == (4, 6, 0)
    texts = {s.key: [c.text for c in s.captions] for shard in ("2", "10") for s in read_samples(str(folder / f"{shard}.tar"))}
    assert texts == {"s0": ["first", "second"], "s1": ["from json"], "s2": ["alone"], "s3": ["list", "wins"]}
    (folder / "nshards.txt").write_text("3")
    with pytest.raises(ValueError, match=r"2 tars but its nshards\.txt says 3"):
        read_manifest(str(folder))


def test_an_empty_caption_is_dropped_and_named_and_a_sample_of_only_those_is_rejected(tmp_path):
    uri = tar_of(
        tmp_path / "x.tar", pair("a", "good", "  ") + pair("b", "", "\n") + [("c.jpg", b"x")] + [("d.json", b"{}"), ("d.jpg", b"")]
    )
    (sample,), problems = split(read_samples(uri))
    assert [c.text for c in sample.captions] == ["good"]
    assert [(p.key, p.what, p.reason) for p in problems] == [
        ("a", "caption", "caption a#1 is empty"),
        ("b", "sample", "no usable caption: caption b#0 is empty (members: .jpg, .json)"),
        ("c", "sample", "no caption (members: .jpg)"),
        ("d", "sample", "no caption (members: .json, .jpg)"),
    ]
    assert [row.key for row in index_shard(uri)] == ["a"]


@pytest.mark.parametrize(
    "said", ["one", "Trail shoes\nsize 42", "a cat\u2028on a mat", "one\r\ntwo", "\u0085 next", ["a cup", "a mug\nof tea"]]
)
def test_field_case_05_a_json_caption_is_one_caption_whatever_it_holds_and_a_list_is_several(tmp_path, said):
    about = json.dumps({"caption": said}).encode()
    uri = tar_of(tmp_path / "x.tar", [("a.jpg", b"x"), ("a.txt", str(said).encode()), ("a.json", about)])
    (sample,) = read_samples(uri)
    assert [c.text for c in sample.captions] == (said if isinstance(said, list) else [said])


def test_field_case_05_lines_of_a_txt_end_at_newlines_only(tmp_path):
    text = "\ufeffa cat\u2028on a mat\r\nsecond\x0b line\nthird\n"
    (sample,) = read_samples(tar_of(tmp_path / "x.tar", [("a.jpg", b"x"), ("a.txt", text.encode())]))
    assert [c.text for c in sample.captions] == ["a cat\u2028on a mat", "second\x0b line", "third"]


def test_field_case_19_members_of_other_kinds_are_named_where_a_sample_lacks_what_they_might_have_been(tmp_path):
    contents = [
        ("1.jpg", b"x"),
        ("1.cap", b"a dog"),
        ("2.img", b"x"),
        ("2.txt", b"a cat"),
        ("3.jpg", b"x"),
        ("3.json", b'{"text": "a cat"}'),
    ]
    contents += [("README.md", b"x"), ("._4.jpg", b"x"), ("5.jpg", b"x"), ("5.txt", b"kept"), ("5.cls", b"7"), ("5.left.png", b"x")]
    samples, problems = split(read_samples(tar_of(tmp_path / "x.tar", contents)))
    assert [(s.key, s.captions[0].text) for s in samples] == [("5", "kept")]
    told = {p.key: (p.what, p.reason) for p in problems}
    assert told["1"] == ("sample", "no caption (members: .jpg, 1.cap)")
    assert told["2"] == ("sample", "no image and no regions (members: .txt, 2.img)")
    assert told["3"] == ("sample", "no caption (members: .jpg, .json, the json has text)")
    assert told["README"][0] == told[""][0] == "member"
    assert "README.md; the kinds are" in told["README"][1]
    assert "._4.jpg" in told[""][1]
    assert len(problems) == 5


def test_field_case_04_keys_with_dots_are_samples_and_counted(tmp_path):
    names = ["trip_v1.5_0001", "trip_v1.5_0002", "22.05", "plain"]
    contents = [member for name in names for member in ((f"{name}.jpg", name.encode()), (f"{name}.txt", f"at {name}".encode()))]
    uri = tar_of(tmp_path / "x.tar", contents)
    assert [(s.key, s.image.decode(), s.captions[0].text) for s in read_samples(uri)] == [(name, name, f"at {name}") for name in names]
    for row, name in zip(index_shard(uri), names, strict=True):
        assert read_range(uri, row.start, row.end).key == row.key == name


def test_a_second_sample_of_the_same_key_is_a_problem_and_the_first_is_kept(tmp_path):
    other = [("a.jpg", b"other"), ("a.json", b'{"captions": ["other"]}')]
    for contents in (pair("a", "one") + other, pair("a", "one") + pair("b", "two") + other):
        samples, problems = split(read_samples(tar_of(tmp_path / "x.tar", contents)))
        assert samples[0].captions[0].text == "one"
        assert [(p.key, p.reason) for p in problems] == [("a", "a second sample of the same key; the first one is kept")]


def test_members_that_are_not_grouped_are_one_problem_a_key(tmp_path):
    a, b, c = pair("a", "one"), pair("b", "two"), pair("c", "three")
    samples, problems = split(read_samples(tar_of(tmp_path / "x.tar", [a[0], b[0], a[1], b[1], *c])))
    assert [s.key for s in samples] == ["c"]
    assert [p.key for p in problems] == ["a", "b"]
    assert all("not next to each other" in p.reason for p in problems)


@pytest.mark.parametrize("cut", [200, 512, 1024, 1400, 2048, 2560])
def test_a_truncated_tar_keeps_its_whole_samples_and_names_the_shard(tmp_path, cut):
    uri = tar_of(tmp_path / "x.tar", pair("a", "one") + pair("b", "two"))
    data = files.read_bytes(uri)
    files.write_atomic(uri, data[:cut])
    samples, problems = split(read_samples(uri))
    assert [s.key for s in samples] == (["a"] if cut >= 1600 else [])
    assert any(p.shard == "x.tar" and "truncated" in p.reason and p.what == "shard" for p in problems)


@pytest.mark.parametrize("text", [b"{", b"[1]", b'{"captions": [1]}', b'{"captions": [{"id": 1}]}', b'{"captions": "x"}', b"\xff\xfe"])
def test_captions_of_the_wrong_type_are_a_problem(tmp_path, text):
    _, (problem,) = split(read_samples(tar_of(tmp_path / "x.tar", [("a.jpg", b"x"), ("a.json", text)])))
    assert problem.reason.startswith("captions cannot be read")


def test_keys_that_webdataset_would_cut_are_refused_and_leave_no_file(tmp_path):
    for key in ("a.b", "a/b", ""):
        with pytest.raises(ValueError, match="dot or slash"):
            write_shard(str(tmp_path / "x.tar"), [Record(key, "train", [Caption("1", "x")], b"x")])
    assert list(tmp_path.iterdir()) == []


def test_region_files_that_are_not_regions_are_refused():
    buffer = io.BytesIO()
    np.savez(buffer, other=np.ones(3))
    for bad, reason in ((b"junk", "not a region file"), (buffer.getvalue(), "features"), (b"", "not a region file")):
        with pytest.raises(ValueError, match=reason):
            Regions.from_npz(bad)
    with pytest.raises(ValueError, match="boxes must be"):
        Regions(np.ones((2, 3), np.float16), np.ones((3, 4)))


def test_a_corrupt_truncated_or_gigantic_image_is_found_by_decoding_it():
    good = png(side=64)
    assert check_image(good) == (64, 64)
    header = bytearray(png(side=16))
    header[16:24] = (20000).to_bytes(4, "big") * 2  # claims 400 megapixels
    for bad in (good[: len(good) // 2], b"not an image", b"", bytes(header)):
        with pytest.raises(ValueError, match=r"decoded|pixels"):
            check_image(bad)
