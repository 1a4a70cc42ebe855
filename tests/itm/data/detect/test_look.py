"""What lies at a path is read in the one way there is, or asked about by the flag that answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from itm.data.detect.finding import Finding, Question, role_of
from itm.data.detect.look import look
from tests.support.raw_layouts import COUNT, LAYOUTS, RECORDS, TEXTS, photos

NO_SPLITS: dict[str, str] = {}
NAMED = {"image_column": "image", "caption_columns": "caption"}
UNNAMED = {"columns": ["column_1", "column_2"], "caption_columns": "column_2"}
ALL = {"train": "train", "val": "val", "test": "test"}
# kind of the source (empty: shards as they are), options of it that matter, splits, kind of image, whether there are captions
EXPECTED: dict[str, tuple[str, dict[str, Any], dict[str, str], str, bool]] = {
    "csv_with_header": (
        "csv",
        {"path": "captions.csv", "image_root": "photos", "image_column": "image", "caption_columns": "caption"},
        NO_SPLITS,
        "pixels",
        True,
    ),
    "tsv_without_header": (
        "csv",
        {"columns": ["column_1", "column_2"], "caption_columns": "column_2", "image_root": "photos"},
        NO_SPLITS,
        "pixels",
        True,
    ),
    "bars_with_numbers": ("csv", {"delimiter": "|", "image_column": "image_name", "caption_columns": "comment"}, NO_SPLITS, "pixels", True),
    "csv_with_splits": ("csv", {"split_column": "split", "image_column": "filename"}, ALL, "pixels", True),
    "txt_beside": ("imagefolder", {"path": "photos"}, NO_SPLITS, "pixels", True),
    "bare_photos": ("imagefolder", {"path": "holiday"}, NO_SPLITS, "pixels", False),
    "imagefolder": ("imagefolder", {"path": "set"}, NO_SPLITS, "pixels", True),
    "parquet": ("parquet", {"path": ""}, NO_SPLITS, "pixels", True),
    "zip_of_photos": ("imagefolder", {"path": "photos.zip"}, NO_SPLITS, "pixels", True),
    "tar_of_photos": ("imagefolder", {"path": "photos.tar"}, NO_SPLITS, "pixels", False),
    "our_shards": ("", {}, ALL, "pixels", True),
    "img2dataset": ("", {}, {"train": "laion"}, "pixels", True),
    "coco": ("coco_captions", {"image_root": "{split}2017"}, {"train": "train", "val": "val"}, "pixels", True),
    "karpathy": ("karpathy", {"path": "dataset_mine.json", "image_root": "images"}, ALL, "pixels", True),
    "pairs": ("pairs_json", {"image_root": "", "path": {s: f"mine_{s}.json" for s in ALL}}, ALL, "pixels", True),
    "precomp": ("precomp", {"path": ""}, ALL | {"val": "dev"}, "regions", True),
    "bua": ("bua_tsv", {"features": "features.tsv"}, NO_SPLITS, "regions", True),
    "uniter": ("uniter_db", {"images": "img_db/feat"}, {"train": "train", "val": "val"}, "regions", True),
}
PATHS = ("path", "image_root", "features", "images")


def inside(value: Any, root: Path) -> Any:
    """Paths of options, relative to the layout's folder."""
    if isinstance(value, dict):
        return {key: inside(inner, root) for key, inner in value.items()}
    return "" if value == str(root) else str(value).removeprefix(f"{root}/")


def found(root: Path, *paths: Path, **answers: str) -> Finding:
    return look([str(path) for path in paths or [root]], {key.replace("_", "-"): value for key, value in answers.items()})


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_and_read_by_its_source(name: str, tmp_path: Path) -> None:
    finding = found(tmp_path, LAYOUTS[name](tmp_path))
    kind, options, splits, image, captioned = EXPECTED[name]
    assert (finding.source.kind if finding.source else "") == kind
    given = finding.source.options if finding.source else {}
    assert {key: inside(given.get(key), tmp_path) if key in PATHS else given.get(key) for key in options} == options
    assert (dict(finding.splits), finding.image, finding.captioned) == (splits, image, captioned)


def test_every_layout_has_an_expected_finding() -> None:
    assert set(LAYOUTS) == set(EXPECTED)
    assert len(LAYOUTS) >= 12


@pytest.mark.parametrize("line", ["comma,in it", "semi;colon", "a plain one"])
def test_the_delimiter_is_the_one_that_gives_image_files(line: str, tmp_path: Path) -> None:
    rows = "".join(f"{name}\t{line}\n" for name in photos(tmp_path))
    (tmp_path / "said.txt").write_text(rows)
    finding = found(tmp_path)
    assert finding.source is not None
    assert (finding.source.options["delimiter"], finding.source.options["columns"]) == ("\t", ["column_1", "column_2"])


QUESTIONS = {
    "two_tables": ("annotations", lambda root: [(root / name).write_text(_rows(root)) for name in ("a.csv", "b.csv")]),
    "two_image_columns": ("image-column", lambda root: (root / "c.csv").write_text(_rows(root, "{0},{0},{1}", "image,mask,caption"))),
    "two_texts": ("caption-columns", lambda root: (root / "c.csv").write_text(_rows(root, '{0},"{1}","{1}"', "image,title,caption"))),
    "two_roots": ("image-root", lambda root: (shutil.copytree(root / "photos", root / "more"), (root / "c.csv").write_text(_rows(root)))),
    "a_name_in_the_first_row": ("header", lambda root: (root / "c.csv").write_text(_rows(root, head="image,photo000.png"))),
    "a_bar_or_a_comma": ("delimiter", lambda root: (root / "c.csv").write_text(_rows(root, "{0},x;{0};{1}", "a,b;c;d"))),
    "beside_and_table": ("annotations", lambda root: (_beside(root), (root / "c.csv").write_text(_rows(root)))),
}


def _rows(root: Path, row: str = "{0},{1}", head: str = "image,caption") -> str:
    names = [path.name for path in sorted((root / "photos").glob("*.png"))]
    return "\n".join([head, *(row.format(name, text) for name, text in zip(names, TEXTS, strict=True)), ""])


def _beside(root: Path) -> None:
    for path in (root / "photos").glob("*.png"):
        path.with_suffix(".txt").write_text("a caption beside")


@pytest.mark.parametrize("case", QUESTIONS)
def test_of_two_readings_the_flag_is_named_and_each_answer_settles_it(case: str, tmp_path: Path) -> None:
    photos(tmp_path)
    flag, write = QUESTIONS[case]
    write(tmp_path)
    with pytest.raises(Question, match=f"--{flag} ") as asked:
        found(tmp_path)
    assert asked.value.flag == flag
    assert len(asked.value.answers) >= 2
    for answer in asked.value.answers:
        finding = look([str(tmp_path)], {flag: answer})
        assert finding.source is not None


def test_photos_beside_a_file_that_names_them_are_not_taken_as_uncaptioned(tmp_path: Path) -> None:
    LAYOUTS["csv_with_header"](tmp_path)
    with pytest.raises(Question) as asked:
        found(tmp_path, tmp_path / "photos")
    assert list(asked.value.answers) == [str(tmp_path / "captions.csv"), "none"]
    assert not found(tmp_path, tmp_path / "photos", annotations="none").captioned
    assert found(tmp_path, tmp_path / "photos", tmp_path / "captions.csv").source == found(tmp_path).source


def test_a_file_without_captions_is_said_to_be_left_aside(tmp_path: Path) -> None:
    finding = found(tmp_path, LAYOUTS["coco"](tmp_path))
    assert any("instances_train2017.json" in note for note in finding.notes)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: None, "holds neither images nor anything that says captions, but nothing"),
        (lambda root: (root / "notes.txt").write_text("hello\n"), "but notes.txt"),
        (lambda root: (root / "a.json").write_text("{"), "a.json is not JSON"),
        (lambda root: (root / "c.csv").write_text("image,caption\nno.jpg,a cat\n"), "names no.jpg, and no such file lies in"),
        (lambda root: (root / "x.tar").write_bytes(b"no tar"), "x.tar cannot be read"),
        (lambda root: (root / "train_ims.npy").write_bytes(b""), "and no train_caps.txt"),
        (lambda root: (root / "c.csv").write_bytes("image,caption\na.jpg,Käse\n".encode("latin-1")), "c.csv is no UTF-8 text"),
    ],
)
def test_what_cannot_be_read_is_named(write: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        found(tmp_path)


def test_roles_are_words_of_a_name() -> None:
    assert [role_of(n) for n in ("captions_train2017.json", "dev", "f30k-test", "contest", "trainval", "validation")] == [
        "train", "val", "test", None, None, "val",
    ]  # fmt: skip


def test_a_karpathy_file_may_keep_images_in_folders(tmp_path: Path) -> None:
    names = photos(tmp_path, "val2014")
    rows = [{"split": "train", "filepath": "val2014", "filename": n, "imgid": 1, "sentences": [{"raw": "a", "sentid": 1}]} for n in names]
    (tmp_path / "d.json").write_text(json.dumps({"images": rows}))
    finding = found(tmp_path)
    assert finding.source is not None
    assert finding.source.options["image_root"] == str(tmp_path)
    assert len(RECORDS) == COUNT


INVENTED: dict[str, Any] = {
    "jsonl": ("c.jsonl", lambda names: "".join(json.dumps({"image": n, "caption": t}) + "\n" for n, t in names)),
    "jsonl_called_json": ("c.json", lambda names: "".join(json.dumps({"image": n, "caption": t}) + "\n" for n, t in names)),
    "dict_of_lists": ("c.json", lambda names: json.dumps({n: [t] for n, t in names})),
    "dict_of_texts": ("c.json", lambda names: json.dumps(dict(names))),
    "other_fields": ("c.json", lambda names: json.dumps([{"file_name": n, "title": t} for n, t in names])),
    "a_list_in_an_object": ("c.json", lambda names: json.dumps({"info": {}, "rows": [{"image": n, "caption": t} for n, t in names]})),
    "excel": ("c.csv", lambda names: "\ufeff" + "".join(f"{n};{t}\r\n" for n, t in [("photo", "title"), *names])),
    "excel_sep": ("c.csv", lambda names: "\ufeffsep=;\r\n" + "".join(f"{n};{t}\r\n" for n, t in [("photo", "title"), *names])),
    "flickr8k": ("Flickr8k.token.txt", lambda names: "".join(f"{n}#0\t{t}\n" for n, t in names)),
    "blank_rows": ("c.csv", lambda names: "image,caption\n" + "".join(f'{n},"{t}"\n,\n' for n, t in names)),
}


@pytest.mark.parametrize("case", INVENTED)
def test_captions_in_whatever_form_are_the_captions_that_were_written(case: str, tmp_path: Path) -> None:
    from itm.data.records import Record
    from itm.data.sources.source import Source
    from pipelines.pack import open_source

    names = list(zip(photos(tmp_path), TEXTS, strict=True))
    file, write = INVENTED[case]
    (tmp_path / file).write_text(write(names), newline="")
    finding = found(tmp_path)
    assert finding.source is not None
    source: Source = open_source(finding.source)
    records = [record for record in source.records("train") if isinstance(record, Record)]
    assert {r.meta["filename"]: [c.text for c in r.captions] for r in records} == {name: [text] for name, text in names}


UNREAD: dict[str, Any] = {
    "workbook": ("captions.xlsx", b"PK\x03\x04", r"captions\.xlsx may hold captions"),
    "compressed": ("captions.csv.gz", b"\x1f\x8b", r"captions\.csv\.gz may hold captions"),
    "names_without_suffix": ("captions.csv", b"id,caption\nphoto000,a dog\n", r"captions\.csv may hold captions.*with its suffix"),
    "texts_elsewhere": ("texts/photo000.txt", b"a dog", r"1 files such as texts/photo000\.txt bear the names"),
    "other_suffix": ("photos/photo000.caption", b"a dog", r"photo000\.caption bear the names"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_captions_that_are_not_read_are_asked_about_and_never_lost_in_silence(case: str, tmp_path: Path) -> None:
    photos(tmp_path)
    name, data, message = UNREAD[case]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Question, match=message):
        found(tmp_path)
    assert not found(tmp_path, annotations="none").captioned


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04", "is an Excel workbook or a zip"),
        ("image,caption\n".encode("utf-16"), "is UTF-16"),
        (b"\x1f\x8b", "compressed by gzip"),
        (b'image,caption\nphoto000.png,"a\nb"\nphoto001.png,"c\nd"\n', "2 quoted cells go on in the next line"),
    ],
)
def test_a_table_that_is_none_is_named_with_the_remedy(data: bytes, message: str, tmp_path: Path) -> None:
    photos(tmp_path)
    (tmp_path / "c.csv").write_bytes(data)
    with pytest.raises(ValueError, match=rf"c\.csv.*{message}"):
        found(tmp_path)


def test_a_name_that_stands_twice_in_an_object_is_refused(tmp_path: Path) -> None:
    photos(tmp_path)
    (tmp_path / "c.json").write_text('{"photo000.png": "a", "photo000.png": "b"}')
    from itm.data.sources.pairs_json import PairsJson

    with pytest.raises(ValueError, match=r"c\.json: 'photo000\.png' stands twice"):
        PairsJson(str(tmp_path / "c.json"))


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    LAYOUTS["csv_with_header"](tmp_path)
    expected = found(tmp_path).source
    (tmp_path / "loop").symlink_to(tmp_path)
    assert found(tmp_path).source == expected


def test_captions_inside_an_archive_and_tars_beside_the_named_one_are_told(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("a.png", RECORDS[0].image or b"")
        archive.writestr("captions.csv", "image,caption\na.png,a dog\n")
    with pytest.raises(Question, match=r"captions\.csv, which is not read inside an archive"):
        found(tmp_path, tmp_path / "all.zip")
    folder = LAYOUTS["img2dataset"](tmp_path)
    first = sorted(folder.glob("*.tar"))[0]
    assert "1 other tars of laion are read as well" in found(tmp_path, first).notes[0]
