"""Random captions, names and images through every source, packed in this process and read back: what came out is what went in, and what did
not is rejected by name. FUZZ_EXAMPLES sets the number of examples of each source."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from itm.config import Part
from itm.data.pixels import decode
from itm.data.records import MAX_CAPTION, Problem, image_format
from itm.data.shards import Sample, read_samples
from pipelines.pack import Job, pack_shard
from tests.support.tars import tar_of

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
ODD = [
    '"',
    '""',
    ",",
    "\n",
    "\r\n",
    "\r",
    "\t",
    "\u2028",
    "\x85",
    "\0",
    "\x0b",
    "😀",
    "مرحبا",
    "é",
    "e\u0301",
    "\ufeff",
    "<person>",
    "'",
    "\\",
    "{}",
]
WHOLE = ["", "  ", "!!!", '"', "x" * 1_000_000, "word " * 4_000, "a" * MAX_CAPTION]
captions = st.one_of(
    st.sampled_from(WHOLE),
    st.lists(st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=8).map("".join),
)
names = st.lists(st.sampled_from(["a", "0", "07", ".", " ", "é", "日", "x" * 60, "-", "_", "#", "?", "%25", "(1)"]), min_size=1, max_size=4)


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def pictures() -> list[bytes]:
    """Every mode that PIL writes in each format, and what else cameras, scanners and the web bring; the last ones are no whole images."""
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    wide = Image.fromarray(random.integers(0, 65536, (9, 7), dtype=np.uint16))
    modes = {mode: noise.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "F")}
    modes |= {"RGBA": noise.convert("RGBA"), "LA": noise.convert("LA"), "I;16": wide, "I": wide.convert("I")}
    modes["RGBA"].putalpha(noise.convert("L"))
    found: list[bytes] = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        for picture in modes.values():
            try:
                found.append(saved(picture, kind))
            except (OSError, ValueError, KeyError):
                continue  # PIL does not write this mode in this format
    exif = Image.Exif()
    exif[0x0112] = 6
    found += [saved(noise, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    frames = {"save_all": True, "append_images": [noise.transpose(Image.Transpose.ROTATE_180)]}
    found += [saved(noise, kind, **frames) for kind in ("GIF", "WEBP", "PNG", "TIFF")]
    found += [saved(noise.resize(size), kind) for size in ((1, 900), (900, 1), (1, 1)) for kind in ("PNG", "JPEG")]
    return [*found, found[0][:60], saved(noise, "PNG")[:80], b"", b"no image", b"GIF89a", b"BM"]


PICTURES = pictures()


def readable(data: bytes) -> bool:
    """By Pillow alone; numbers without a known range are no picture."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.mode != "F"
    except Exception:
        return False


READABLE = [readable(data) for data in PICTURES]
Row = tuple[str, int, list[str]]
"""A file name, the number of a picture, captions."""


def kept_of(texts: list[str]) -> list[str]:
    """What is left of captions: white space joined, empty ones and those beyond the limit gone."""
    joined = (" ".join(text.split()) for text in texts)
    return [text for text in joined if text and len(text) <= MAX_CAPTION]


@st.composite
def rows(draw: Any, least: int = 1, forbidden: str = "", captions_a_row: int = 3) -> list[Row]:
    made: dict[str, Row] = {}
    folders: dict[str, int] = {}
    for _ in range(draw(st.integers(1, 4))):
        stem = "".join(draw(names)).strip(" .") or "n"
        name = f"{draw(st.sampled_from(['', 'sub/', 'sub.d/']))}{stem}{draw(st.sampled_from(['.jpg', '.PNG', '.jfif', '', '.txt']))}"
        folders.setdefault(unicodedata.normalize("NFC", name).lower(), len(folders))
        texts = draw(st.lists(captions, min_size=least, max_size=captions_a_row))
        for character in forbidden:
            texts = [text.replace(character, " ") for text in texts]
        made[name] = (name, draw(st.integers(0, len(PICTURES) - 1)), texts)
    return list(made.values())


def as_csv(folder: Path, data: list[Row], delimiter: str = ",") -> Part:
    path = folder / "captions.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        writer.writerows([("image", "caption"), *((name, text) for name, _, texts in data for text in texts)])
    return Part(kind="csv", options={"path": {"train": str(path)}, "image_root": str(folder / "im"), "delimiter": delimiter})


def as_tsv(folder: Path, data: list[Row]) -> Part:
    """Without any quoting, as people write them."""
    lines = ["image\tcaption", *(f"{name}\t{text}" for name, _, texts in data for text in texts)]
    (folder / "captions.tsv").write_bytes("\n".join(lines).encode())
    return Part(kind="csv", options={"path": {"train": str(folder / "captions.tsv")}, "image_root": str(folder / "im")})


def as_pairs(folder: Path, data: list[Row]) -> Part:
    (folder / "a.json").write_text(json.dumps([{"image": name, "caption": texts} for name, _, texts in data]))
    return Part(kind="pairs_json", options={"path": {"train": str(folder / "a.json")}, "image_root": str(folder / "im")})


def as_coco(folder: Path, data: list[Row]) -> Part:
    images = [{"id": n, "file_name": name} for n, (name, _, _) in enumerate(data)]
    said = [{"image_id": n, "caption": text} for n, (_, _, texts) in enumerate(data) for text in texts]
    said = [{"id": n, **row} for n, row in enumerate(said)]
    (folder / "a.json").write_text(json.dumps({"images": images, "annotations": said}, ensure_ascii=False), encoding="utf-8")
    return Part(kind="coco_captions", options={"path": {"train": str(folder / "a.json")}, "image_root": str(folder / "im")})


def as_karpathy(folder: Path, data: list[Row]) -> Part:
    images = [
        {"split": "train", "imgid": n, "filename": name, "sentences": [{"raw": text, "sentid": 10 * n + k} for k, text in enumerate(texts)]}
        for n, (name, _, texts) in enumerate(data)
    ]
    (folder / "a.json").write_text(json.dumps({"images": images}))
    return Part(kind="karpathy", options={"path": str(folder / "a.json"), "image_root": str(folder / "im")})


SOURCES: dict[str, tuple[Callable[[Path, list[Row]], Part], dict[str, Any]]] = {
    "csv": (as_csv, {"forbidden": "\n"}),
    "tsv": (as_tsv, {"forbidden": "\n\t"}),
    "pairs_json": (as_pairs, {"least": 0}),
    "coco": (as_coco, {"least": 0}),
    "karpathy": (as_karpathy, {"least": 0}),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_what_a_source_lists_is_packed_as_it_is_or_rejected_by_name(kind: str) -> None:
    write, how = SOURCES[kind]

    @fuzzed
    @given(rows(**how))
    def run(data: list[Row]) -> None:
        with TemporaryDirectory() as folder:
            for name, picture, _ in data:
                target = Path(folder, "im", name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(PICTURES[picture])
            part = write(Path(folder), data)
            receipt = json.loads(pack_shard(Job(part, "train", "pixels", "m", f"{folder}/0.tar", 0, len(data))))
            items = list(read_samples(f"{folder}/0.tar"))
        assert not [item for item in items if isinstance(item, Problem)]
        packed = {item.meta["filename"]: item for item in items if isinstance(item, Sample)}
        bare = not any(texts for _, _, texts in data)  # photos without captions, which can be searched
        expected = {name: kept_of(texts) for name, picture, texts in data if READABLE[picture] and (bare or kept_of(texts))}
        assert {name: [c.text for c in sample.captions] for name, sample in packed.items()} == expected
        lost = Counter(problem["what"] for problem in receipt["problems"])
        assert lost["sample"] == len(data) - len(expected)
        read = sum(len(texts) for _, _, texts in data)
        gone = sum(1 if p["what"] == "caption" else p["captions"] for p in receipt["problems"])
        assert gone == read - sum(map(len, expected.values()))
        assert all(p["key"] and p["reason"] and p["stage"] and p["shard"] for p in receipt["problems"])
        for name, picture, _ in data:
            if name in packed:
                same_picture(packed[name].image or b"", PICTURES[picture])

    run()


def same_picture(stored: bytes, original: bytes) -> None:
    if image_format(original) in ("jpg", "png", "webp"):
        assert stored == original
        return
    with Image.open(io.BytesIO(original)) as image:
        image.load()  # a TIFF is turned by this
        expected = np.asarray(image)
        if image.mode in ("RGB", "L"):
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored))), expected)
    np.testing.assert_array_equal(np.asarray(decode(stored)), np.asarray(decode(original)))


@fuzzed
@given(rows(), st.integers(0, 3))
def test_a_newline_inside_a_quoted_cell_is_an_error_with_its_line(data: list[Row], number: int) -> None:
    with TemporaryDirectory() as folder:
        name, picture, _ = data[number % len(data)]
        data = [(n, p, [" ".join(text.split()) for text in texts]) for n, p, texts in data]
        data[number % len(data)] = (name, picture, ["one\ntwo"])
        line = 2 + sum(len(texts) for _, _, texts in data[: number % len(data)])
        part = as_csv(Path(folder), data)
        with pytest.raises(ValueError, match=rf"captions\.csv line {line}: a quoted cell does not end"):
            pack_shard(Job(part, "train", "pixels", "m", f"{folder}/0.tar", 0, len(data)))


@fuzzed
@given(rows(least=1), st.sampled_from(["json", "caption", "txt"]))
def test_every_sample_of_a_foreign_tar_is_read_whatever_its_key(data: list[Row], way: str) -> None:
    members: list[tuple[str, bytes]] = []
    expected: dict[str, list[str]] = {}
    for name, _, texts in data:
        key = name.removesuffix(".").removesuffix(".txt").removesuffix(".jpg").removesuffix(".PNG").removesuffix(".jfif")
        if key in expected or key.rpartition("/")[2].startswith("."):
            continue
        if way == "txt":
            texts = [" ".join(t.replace("\ufeff", "").splitlines()) for t in texts]
        texts = texts[:1] if way == "caption" else texts
        said = {"json": {"captions": texts}, "caption": {"caption": texts[0]}}.get(way)
        content = "\n".join(texts).encode() if said is None else json.dumps(said).encode()
        members += [(f"{key}.png", PICTURES[0]), (f"{key}.{'txt' if said is None else 'json'}", content)]
        expected[key] = texts
    with TemporaryDirectory() as folder:
        items = list(read_samples(tar_of(Path(folder, "0.tar"), members)))
    found = {item.key: [c.text for c in item.captions] for item in items if isinstance(item, Sample)}
    usable = {key: [t for t in texts if t.strip() and len(t) <= MAX_CAPTION] for key, texts in expected.items()}
    assert found == {key: texts for key, texts in usable.items() if texts}
    problems = [item for item in items if isinstance(item, Problem)]
    assert {p.key for p in problems if p.what == "sample"} == usable.keys() - found.keys()
    if way == "json":
        assert sum(p.lost_captions for p in problems) == sum(map(len, expected.values())) - sum(map(len, found.values()))
