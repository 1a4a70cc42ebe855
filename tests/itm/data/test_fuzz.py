"""Readers of bytes from outside, fed with bytes that nobody wrote: only ValueError, with the file's name, and never a hang."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itm.data import sidecar as s
from itm.data.manifest import Manifest, Receipt, ShardInfo, read_receipt, write_manifest, write_receipt
from itm.data.preprocess import ImageInput, augment, draw, read_regions
from itm.data.records import Caption, Problem, Record, Regions, check_image
from itm.data.shards import Sample, read_manifest, read_range, read_samples, scan_shard, write_shard
from tests.support.tars import pair, png, records, tar_of

# Each example is bounded too: a reader that does not end is a failure, not a slow test.
bounded = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "150")),
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """`whole` cut, with bits flipped, with a piece overwritten, doubled or taken out; or arbitrary bytes."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["cut", "flip", "put", "double", "drop", "any"])):
            case "cut":
                del data[at:]
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "put":
                piece = draw(st.binary(min_size=1, max_size=24))
                data[at : at + len(piece)] = piece
            case "double":
                data[at:at] = data[at : at + 512]
            case "drop":
                del data[at : at + draw(st.integers(1, 1024))]
            case "any":
                data = bytearray(draw(st.binary(max_size=2048)))
    return bytes(data)


def tried(read: Callable[[], Any]) -> tuple[Any, str]:
    """(what it gives, "") or (None, what its ValueError says)."""
    try:
        return read(), ""
    except ValueError as error:
        return None, str(error)


def rechecked(data: bytes) -> bytes:
    """Every 512-byte block with a fresh header checksum, so that damage gets past it."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def tars(folder: Path) -> list[bytes]:
    """A shard of ours, and tars with long names and PAX records, which the fallback reads."""
    import tarfile

    write_shard(str(folder / "ours.tar"), records())
    long = [(f"{'n' * 120}/{name}", data) for name, data in pair("a", "one") + pair("b", "two")]
    for how in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        tar_of(folder / f"long{how}.tar", long, format=how)
    return [path.read_bytes() for path in sorted(folder.glob("*.tar"))]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("mended", [False, True], ids=["raw", "checksums mended"])
def test_a_damaged_tar_gives_samples_and_problems_and_nothing_else(tmp_path: Path, which: int, mended: bool) -> None:
    whole = tars(tmp_path)[which]
    target = tmp_path / "fuzz" / "x.tar"
    target.parent.mkdir()

    @bounded
    @given(damaged(whole))
    def run(data: bytes) -> None:
        target.write_bytes(rechecked(data) if mended else data)
        items = list(read_samples(str(target)))
        for item in items:
            assert isinstance(item, Sample | Problem)
            if isinstance(item, Problem):
                assert item.shard == "x.tar"
                json.loads(item.row().encode())
        good = [item for item in items if isinstance(item, Sample)]
        index, problems, _ = scan_shard(str(target))
        assert [(r.key, r.captions) for r in index] == [(g.key, len(g.captions)) for g in good]
        assert len(index) + len(problems) == len(items)
        for row, sample in zip(index, good, strict=True):
            alone = read_range(str(target), row.start, row.end)
            assert (alone.key, alone.image, alone.captions) == (sample.key, sample.image, sample.captions)

    run()


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_damaged_sidecar_is_read_right_or_refused_by_name(tmp_path: Path, dtype: str) -> None:
    uri = str(tmp_path / "00000.arrow")
    header = s.Header({"kind": "k"}, "text", dtype, "00000.tar", "ab" * 32)
    vectors = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    s.write_sidecar(uri, header, list("aabbc"), vectors, ["0", "1", "0", "1", "0"], [None, None, "broken", None, None])
    whole = Path(uri).read_bytes()

    @bounded
    @given(damaged(whole))
    def run(data: bytes) -> None:
        Path(uri).write_bytes(data)
        back, said = tried(lambda: s.read_sidecar(uri, "ab" * 32, s.teacher_id({"kind": "k"})))
        if said:
            assert uri in said
            return
        assert back.vectors.shape == (len(back.keys), 8)
        assert np.isfinite(back.vectors).all()
        assert len(back.captions or []) == len(back.problems) == len(back.keys)

    run()


def test_a_damaged_store_or_pointer_is_refused_by_name(tmp_path: Path) -> None:
    header = s.Header({"kind": "k"}, "image", "fp32", "00000.tar", "ab" * 32)
    choice = {"modality": "image", "kind": "k", "options": {}, "dtype": "fp32"}
    store = Path(s.write_store(str(tmp_path), choice, {"00000.tar": header}, {"kind": "k"})) / "store.json"
    whole = store.read_bytes()

    @bounded
    @given(damaged(whole))
    def run(data: bytes) -> None:
        store.write_bytes(data)
        _, said = tried(lambda: s.find_store(str(tmp_path), choice).check([("00000.tar", "ab" * 32)]))
        assert not said or str(store.parent) in said

    run()


def test_a_damaged_manifest_is_refused_by_name_and_a_damaged_receipt_is_none(tmp_path: Path) -> None:
    info = ShardInfo(name="00000.tar", samples=2, captions=3, bytes=10, sha256="ab")
    write_manifest(str(tmp_path), Manifest(split="train", source="t", shards=[info]))
    (tmp_path / "00000.tar").write_bytes(bytes(10))
    rows = [("a", 1, 0, 5), ("b", 2, 5, 10)]
    write_receipt(str(tmp_path / "00000.tar"), Receipt(info=info, made_from="t", rows=rows, problems=[Problem("c", "x", "pack", "y")]))
    paths = tmp_path / "manifest.json", tmp_path / "00000.index.json"
    whole = [path.read_bytes() for path in paths]

    @bounded
    @given(damaged(whole[0]), damaged(whole[1]))
    def run(manifest: bytes, receipt: bytes) -> None:
        paths[0].write_bytes(manifest)
        paths[1].write_bytes(receipt)
        read, said = tried(lambda: read_manifest(str(tmp_path)))
        assert "manifest.json" in said if said else all("/" not in shard.name and shard.samples >= 0 for shard in read.shards)
        found = read_receipt(str(tmp_path / "00000.tar"))
        assert found is None or found.info.bytes == 10

    run()


def test_damaged_region_files_and_images_are_values_or_value_errors() -> None:
    regions = Regions(np.ones((3, 4), np.float16), np.ones((3, 4), np.float32), 64, 48, np.ones(3, np.float32)).to_npz()

    @bounded
    @given(damaged(regions), damaged(png(side=16)))
    def run(npz: bytes, image: bytes) -> None:
        try:
            got = read_regions(npz, limit=4)
            assert np.isfinite(got["regions"]).all() and np.isfinite(got["boxes"]).all()
        except ValueError:
            pass
        for read in (check_image, lambda data: augment(data, ImageInput(size=8, crop="random"), draw(0, 0, "k"))):
            assert " at 0x" not in tried(lambda read=read: read(image))[1], "a memory address differs from run to run"

    run()


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=200, deadline=2000)
def test_whatever_a_caption_holds_its_fault_and_its_row_can_be_written(name: str, text: str) -> None:
    caption = Caption(name, text)
    assert caption.fault() or (name + text).encode()
    json.loads(Problem(name, "x.tar", "read", text).row().encode())
    with np.errstate(all="raise"):
        assert isinstance(Record("k", "train", [caption]), Record)
