"""The law of every stage: what is read is written or rejected, images and captions alike, and the last line says so."""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itm.data.manifest import QUARANTINE
from itm.data.records import Problem
from itm.data.shards import Sample, read_manifest, read_samples
from pipelines import inspect
from pipelines.cli import stage_main
from pipelines.repair import repair
from tests.support.tars import png, tar_of

SUM = re.compile(r"([\d,]+) (\w+) = ([\d,]+) .*?\+ ([\d,]+) rejected")


def sums(line: str) -> dict[str, tuple[int, int, int]]:
    """What: (in, out, rejected) of a last line; they must add up."""
    found = {
        what: tuple(int(n.replace(",", "")) for n in numbers) for seen, what, *rest in SUM.findall(line) for numbers in [(seen, *rest)]
    }
    assert found
    for seen, out, rejected in found.values():
        assert seen == out + rejected
    return found  # type: ignore[return-value]


def photos(folder: Path) -> Path:
    """Nine rows and fifteen captions: false suffixes, other formats, a missing and a broken image, captions that fail."""
    picture = Image.open(io.BytesIO(png(3, 24)))
    for name, kind in (("a", "JPEG"), ("b.jfif", "JPEG"), ("c.bmp", "BMP"), ("d.jpg", "GIF"), ("e.tif", "TIFF"), ("f.png", "WEBP")):
        picture.save(folder / name, kind)
    (folder / "g.jpg").write_bytes(png(1)[:60])
    (folder / "h.txt").write_text("no picture")
    rows = [{"image": name, "caption": [f"{name} one", " "]} for name in ("a", "b.jfif", "c.bmp", "d.jpg", "e.tif")]
    rows += [{"image": "f.png", "caption": "f"}, {"image": "g.jpg", "caption": ["g", "gg"]}, {"image": "h.txt", "caption": "h"}]
    rows += [{"image": "gone.jpg", "caption": None}]
    (folder / "pairs.json").write_text(json.dumps(rows))
    (folder / "recipe.yaml").write_text(
        json.dumps(
            {
                "name": "t",
                "model": {"kind": "dual"},
                "data": {
                    "root": str(folder / "out"),
                    "max_reject_rate": 0.9,
                    "source": {"kind": "pairs_json", "options": {"path": str(folder / "pairs.json"), "image_root": str(folder)}},
                },
            }
        )
    )
    return folder / "recipe.yaml"


def test_field_case_15_formats_are_told_by_their_bytes_and_packing_accounts_for_each_caption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = photos(tmp_path)
    assert stage_main("inspect", ["-c", str(recipe)]) == 1
    foreseen = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert stage_main("pack", ["-c", str(recipe)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert sums(line) == {"images": (9, 6, 3), "captions": (15, 6, 9)}
    assert stage_main("pack", ["-c", str(recipe)]) == 0
    assert capsys.readouterr().out.splitlines() == [line]
    held = [item for item in read_samples(str(tmp_path / "out/train/00000.tar")) if isinstance(item, Sample)]
    assert [(s.key, s.meta.get("converted_from")) for s in held] == [
        ("a", None),
        ("b", None),
        ("c", "bmp"),
        ("d", "gif"),
        ("e", "tiff"),
        ("f", None),
    ]
    for sample, name in zip(held, ("a", "b.jfif", "c.bmp", "d.jpg", "e.tif", "f.png"), strict=True):
        assert (sample.image == (tmp_path / name).read_bytes()) == (not sample.meta.get("converted_from"))
        stored, original = (np.asarray(Image.open(f).convert("RGB")) for f in (io.BytesIO(sample.image or b""), tmp_path / name))
        np.testing.assert_array_equal(stored, original)
    rows = [json.loads(row) for row in (tmp_path / "out/train" / QUARANTINE).read_text().splitlines()]
    assert all(row["key"] and row["reason"] and row["stage"] for row in rows)
    assert f"problems  {len(rows)}; left out: 3 samples, 9 captions" in foreseen
    for row in rows[:10]:
        assert row["reason"] in foreseen


def test_a_tar_of_faults_is_accounted_for_by_inspect_and_by_repair_to_the_last_caption(tmp_path: Path) -> None:
    said = lambda *texts: json.dumps({"captions": texts}).encode()
    source = tmp_path / "foreign"
    source.mkdir()
    first = [("a.png", png(1)), ("a.json", said("one", " ", "two")), ("b.png", png(2)[:80]), ("b.json", said("x", "y"))]
    first += [("c.json", said("no", "picture", "here")), ("a.png", png(3)), ("a.json", said("again", "and again"))]
    tar_of(source / "0.tar", first)
    tar_of(source / "1.tar", [("a.png", png(4)), ("a.txt", b"other\nshard\n"), ("d.png", png(5)), ("d.txt", b"!!"), ("e.cap", b"?")])
    written = 3 + 2 + 3 + 2 + 2 + 1
    report = inspect.inspect(str(source))
    assert sum(n * times for n, times in report.captions.items()) == 2 + 2 + 2 + 1  # of b, too, which is read and not decoded
    assert sum(p.lost_captions for p in report.problems if p.stage == "read") == 1 + 3 + 2
    assert {p.key: p.lost_captions for p in report.problems if p.stage == "inspect"} == {"b": 2, "d": 1}
    assert "    1.tar e: of no kind that is read: e.cap" in report.text()
    manifest = repair(str(source), str(tmp_path / "clean"))
    rows = [Problem(**json.loads(row)) for row in (tmp_path / "clean" / QUARANTINE).read_text().splitlines()]
    assert manifest.captions + sum(row.lost_captions for row in rows) == written
    assert read_manifest(str(tmp_path / "clean")).samples == 3


def test_quick_looks_at_a_few_images_and_inspect_counts_what_is_turned_or_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (8, 6), (9, 9, 200))
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.convert("RGBA").save(tmp_path / "clear.png")
    members = [
        ("00.jpg", (tmp_path / "turned.jpg").read_bytes()),
        ("00.txt", b"a"),
        ("01.png", (tmp_path / "clear.png").read_bytes()),
        ("01.txt", b"b"),
    ]
    members += [(f"{n:02d}.{end}", data) for n in range(2, 20) for end, data in (("png", png(2)[: 900 if n < 15 else 90]), ("txt", b"c"))]
    tar_of(tmp_path / "0.tar", members)
    assert inspect.run(argparse.Namespace(uri=str(tmp_path), index=False)) == 1
    told = capsys.readouterr().out
    for words in (
        "turned    1 by",
        "clear     1 have",
        "copies    16 samples",
        "15 decoded",
        "problems  5; left out: 5 samples, 5 captions",
    ):
        assert words in told
    assert inspect.run(argparse.Namespace(uri=str(tmp_path), index=False, quick=True)) == 0
    assert "8 decoded" in capsys.readouterr().out
