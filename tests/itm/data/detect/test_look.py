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
