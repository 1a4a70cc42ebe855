"""Photos as people keep them: folders, archives, captions beside them or in metadata files; nothing is lost uncounted."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest

from itm.data.records import Problem, Record
from itm.data.sources.folder import ImageFolder
from tests.support.pictures import picture, said, write


def zipped(path: Path, content: dict[str, bytes], utf8: bool = True) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    if not utf8:  # as a Mac writes it: the bytes are UTF-8, the flag that says so is not set
        raw = bytearray(path.read_bytes())
        for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            place = raw.find(mark)
            while place >= 0:
                raw[place + at + 1] &= ~0x08
                place = raw.find(mark, place + 4)
        path.write_bytes(raw)
    return str(path)


def test_a_bare_folder_is_read_by_bytes_and_what_is_no_image_is_counted(tmp_path):
    folder = write(
        tmp_path / "photos",
        {
            "a.jpg": picture(1, "JPEG"),
            "deep/er/b": picture(2),
            "c.jfif": picture(3, "JPEG"),
            "named_wrongly.jpg": picture(4, "GIF"),
            "d.BMP": picture(5, "BMP"),
            "e.tif": picture(6, "TIFF"),
            "half.png": b"",
            "page.png": "<html>404</html>",
            "live.HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "notes.pdf": b"%PDF-1.7",
            "lonely.txt": "a text of no image",
            ".DS_Store": b"Bud1",
            "._a.jpg": b"\0\5\x16\7",
        },
    )
    source = ImageFolder(str(folder))
    records = list(source.records("train"))
    good = {r.meta["filename"]: r for r in records if isinstance(r, Record)}
    assert {name: r.image_format for name, r in good.items()} == {
        "a.jpg": "jpg", "deep/er/b": "png", "c.jfif": "jpg", "named_wrongly.jpg": "gif", "d.BMP": "bmp", "e.tif": "tiff",
    }  # fmt: skip
    assert all(r.image == (folder / name).read_bytes() for name, r in good.items())
    reasons = {r.key: r.reason for r in records if isinstance(r, Problem)}
    assert reasons.keys() == {"half", "page", "live"}
    for key, words in (
        ("half", "half.png is empty"),
        ("page", "page.png is no image"),
        ("live", "live.HEIC is a HEIC image, which is not"),
    ):
        assert words in reasons[key]
    assert [(p.key, p.what) for p in source.passed_over("train")] == [
        (name, "member") for name in sorted((".DS_Store", "._a.jpg", "lonely.txt", "notes.pdf"))
    ]
    assert len(records) + len(source.passed_over("train")) == sum(p.is_file() for p in folder.rglob("*"))
    assert source.uncaptioned("train")
    assert len({r.key for r in records}) == len(records)


def test_a_text_beside_an_image_holds_a_caption_a_line(tmp_path):
    write(
        tmp_path,
        {
            "x/a.jpg": picture(1), "x/a.txt": "\ufeffa dog\r\na \u2028 cat\r\n\n",
            "b.tar.png": picture(2), "b.tar.png.txt": "two dots", "c.png": picture(3), "c.txt": b"caf\xe9\n",
        },
    )  # fmt: skip
    source = ImageFolder(str(tmp_path))
    assert not source.uncaptioned("train")
    assert {name: texts for name, texts in said(source).items() if name != "c.png"} == {
        "x/a.jpg": ["a dog", "a \u2028 cat"], "b.tar.png": ["two dots"],
    }  # fmt: skip
    (lost,) = [c for r in source.records("train") if r.meta["filename"] == "c.png" for c in r.captions]
    assert "c.txt line 1 is not UTF-8" in str(lost.fault())


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_field_case_imagefolder_metadata_files_name_images_beside_them_and_split_folders_are_splits(tmp_path, kind):
    rows = [("sub/a.png", "one, two", 3), ("sub/a.png", 'said "so"', 3), ("gone.png", "lost", 4)]
    text = "\n".join(json.dumps({"file_name": n, "text": t, "label": v}) for n, t, v in rows)
    if kind == "csv":
        text = "file_name,text,label\n" + "\n".join(f'{n},"{t.replace(chr(34), chr(34) * 2)}",{v}' for n, t, v in rows)
    write(tmp_path, {f"train/metadata.{kind}": text, "train/sub/a.png": picture(1), "train/unlisted.png": picture(2)})
    write(tmp_path, {"validation/b.png": picture(3), "validation/b.txt": "bee", "test/c.png": picture(4)})
    source = ImageFolder(str(tmp_path))
    assert source.splits == ["train", "val", "test"]
    assert said(source) == {"train/sub/a.png": ["one, two", 'said "so"'], "train/unlisted.png": []}
    assert [source.uncaptioned(s) for s in source.splits] == [False, False, True]
    (problem,) = [r for r in source.records("train") if isinstance(r, Problem)]
    assert problem.captions == 1
    assert problem.reason.endswith(f"metadata.{kind} line {3 if kind == 'jsonl' else 4}: no image gone.png beside the metadata file")
    assert {str(r.meta["label"]) for r in source.records("train") if isinstance(r, Record) and r.captions} == {"3"}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{"file_name"', r"metadata.jsonl line 2 is no JSON"),
        ('{"text": "x"}', r"metadata.jsonl line 1 has no `file_name`; it has text"),
        ("[1]", r"line 1 is a list, not an object"),
        ('{"file_name": "a.png", "description": "x"}', r"captions, text; it has description, file_name: set caption_columns"),
        ('{"file_name": "a.png", "text": "x", "caption": "y"}', r"more than one column of captions, caption, text"),
    ],
)  # fmt: skip
def test_a_metadata_file_that_cannot_be_read_is_named_with_its_line(tmp_path, metadata, words):
    write(tmp_path, {"a.png": picture(), "metadata.jsonl": metadata})
    with pytest.raises(ValueError, match=words):
        ImageFolder(str(tmp_path))


def test_captions_of_metadata_may_be_null_lists_or_in_several_columns(tmp_path):
    rows = [{"file_name": "a.png", "first": ["x", "y"], "second": None}, {"file_name": "a.png", "first": "z"}]
    write(tmp_path, {"a.png": picture(), "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    (record,) = ImageFolder(str(tmp_path), ["first", "second"]).records("train")
    assert [c.text for c in record.captions if not c.fault()] == ["x", "y", "z"]
    faults = [c.fault() for c in record.captions if c.fault()]
    assert [f.rpartition("metadata.jsonl")[2] for f in faults] == [" line 1: the caption is null", " line 2 has no second"]
    assert ImageFolder(str(tmp_path), []).uncaptioned("train")
    with pytest.raises(ValueError, match="has no column third; it has file_name, first, second"):
        ImageFolder(str(tmp_path), "third")


def test_an_archive_of_a_mac_is_read_as_the_folder_it_was_made_of(tmp_path):
    name = unicodedata.normalize("NFD", "caf\u00e9.png")
    assert name != "caf\u00e9.png"
    rows = json.dumps({"file_name": "caf\u00e9.png", "caption": "a cup"}, ensure_ascii=False)
    content = {f"pics/{name}": picture(1), f"__MACOSX/pics/._{name}": b"\0\5\x16\7", "pics/metadata.jsonl": rows.encode()}
    sources = [ImageFolder(zipped(tmp_path / "a.zip", content)), ImageFolder(zipped(tmp_path / "b.zip", content, utf8=False))]
    for suffix, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        with tarfile.open(tmp_path / f"a.{suffix}", mode) as archive:
            for member, data in content.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        sources.append(ImageFolder(str(tmp_path / f"a.{suffix}")))
    for source in sources:
        assert said(source) == {"pics/caf\u00e9.png": ["a cup"]}
        assert [r.image for r in source.records("train")] == [picture(1)]
        assert [p.reason for p in source.passed_over("train")] == ["a Mac's notes on another file"]
    assert len({json.dumps(source.identity()) for source in sources}) == 1


def test_split_folders_may_lie_below_the_folder_that_was_zipped(tmp_path):
    source = ImageFolder(zipped(tmp_path / "a.zip", {"set/train/a.png": picture(1), "set/valid/b.png": picture(2)}))
    assert source.splits == ["train", "val"]
    with pytest.raises(ValueError, match="split folders test, train and also images without a folder: move these out"):
        ImageFolder(str(write(tmp_path / "x", {"train/a.png": picture(), "test/a.png": picture(), "banner.png": picture()})))


def test_what_is_no_folder_or_whole_archive_is_refused_by_name(tmp_path):
    content = {"a.png": picture(1), "b.png": picture(2)}
    whole = Path(zipped(tmp_path / "whole.zip", content)).read_bytes()
    write(tmp_path, {"half.zip": whole[: len(whole) // 2], "x.csv": "image,caption\n", "none/readme.md": "x"})
    with tarfile.open(tmp_path / "whole.tar", "w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "half.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:700])
    for name, words in (
        ("half.zip", "no whole zip"), ("half.tar", "no whole tar"), ("x.csv", "no zip or tar"), ("nothing", "no folder, zip or tar"),
        ("none", "no image in .*none: it holds 1 files"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            ImageFolder(str(tmp_path / name))


def test_another_caption_or_photo_is_another_identity(tmp_path):
    write(tmp_path, {"a.png": picture(1), "a.txt": "dog"})
    seen = [json.dumps(ImageFolder(str(tmp_path)).identity())]
    for change in ({"a.txt": "cat"}, {"b.png": picture(2)}):
        write(tmp_path, change)
        seen.append(json.dumps(ImageFolder(str(tmp_path)).identity()))
    assert len(set(seen)) == 3
