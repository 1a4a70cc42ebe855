"""Decoding and resizing: bounded memory for any aspect ratio, EXIF orientation, transparency. Pillow's own ways are the reference."""

from __future__ import annotations

import io
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from itm.data.pixels import Traits, decode, decode_jpeg, resized, traits
from itm.data.preprocess import ImageInput, Inputs, augment, draw, fit, fit_quickly
from itm.data.shards import Sample
from itm.teachers.image import PixelPreparer, hsv_pyramid


def stripes(width: int, height: int) -> Image.Image:
    """A smooth picture: two values of a resampling are then close even where their filters differ by a rounding."""
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    return Image.fromarray(np.stack([np.broadcast_to(v, (height, width)) for v in (x, y, (x + y) / 2)], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)  # type: ignore[arg-type]
    return out.getvalue()


GROWTH = """
import io, resource
from PIL import Image
from itm.data.preprocess import ImageInput, Inputs, draw
for crop in ("center", "squash", "random"):
    inputs = Inputs(ImageInput(size=224, crop=crop), None)
    for kind, size in (("PNG", 2_000_000), ("JPEG", 60_000)):
        for whole in ((size, 1), (1, size)):
            out = io.BytesIO()
            Image.new("RGB", whole, (200, 10, 90)).save(out, kind)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for numbers in (None, draw(0, 0, "k")):
                pixels = inputs.image_columns(out.getvalue(), numbers)["pixels"]
                assert pixels.shape == (224, 224, 3), pixels.shape
                assert abs(pixels.reshape(-1, 3).mean(0) - (200, 10, 90)).max() < 3
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_field_case_01_the_memory_of_a_long_image_is_bounded_by_the_result() -> None:
    """In a child, whose memory beside the imports may not grow by 96 MB: scaling the whole would take 1 GB to 1 TB."""
    child = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    grown = [int(line) for line in child.stdout.split()]
    assert len(grown) == 12
    assert max(grown) < 96 << (10 if sys.platform == "linux" else 20)


def test_field_case_01_teachers_bound_their_memory_too() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((2_000_000, 1), (1, 2_000_000)):
        sample = Sample("k", encoded(Image.new("RGB", size, (200, 10, 90))), None, [], {})
        for preparer in (PixelPreparer(224, None, (224, 224)), PixelPreparer(None, (224, 224), None), PixelPreparer(256, None, (224, 200))):
            pixels = np.frombuffer(preparer(sample), np.uint8).reshape(*preparer.shape, 3)
            assert np.abs(pixels.reshape(-1, 3).mean(0) - (200, 10, 90)).max() < 1
        np.testing.assert_allclose(hsv_pyramid(decode(sample.image or b""), 128) ** 2 @ np.ones(1536), 8, rtol=1e-5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << (10 if sys.platform == "linux" else 20)


@pytest.mark.parametrize("size", [(1000, 3), (3, 1000), (400, 5), (64, 2000)])
def test_a_part_that_is_computed_alone_is_that_of_the_whole(size: tuple[int, int]) -> None:
    image, side = stripes(*size), 24
    short = min(size)
    whole = tuple(side if s == short else int(side * s / short) for s in size)
    left, top = (round((s - side) / 2) for s in whole)
    cut = (left, top, left + side, top + side)
    expected = image.resize(whole, Image.Resampling.BICUBIC).crop(cut)  # type: ignore[arg-type]
    np.testing.assert_allclose(resized(image, whole, cut), expected, atol=1)  # type: ignore[arg-type]
    squashed = resized(image, (side, side))
    np.testing.assert_allclose(squashed, image.resize((side, side), Image.Resampling.BICUBIC), atol=2)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1600, 110), (40, 30), (224, 224), (30, 400)])
def test_an_ordinary_image_is_resized_as_a_whole_bit_for_bit(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    short = min(size)
    whole = [224 if s == short else int(224 * s / short) for s in size]
    left, top = (round((s - 224) / 2) for s in whole)
    expected = image.resize((whole[0], whole[1]), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    np.testing.assert_array_equal(fit(image, 224, "center"), expected)
    np.testing.assert_array_equal(fit(image, 224, "squash"), image.resize((224, 224), Image.Resampling.BICUBIC))


def turned(image: Image.Image, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif.tobytes(), **({"quality": 95} if kind != "PNG" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_field_case_17_the_orientation_of_a_camera_is_applied_and_can_be_switched_off(kind: str, orientation: int) -> None:
    data = turned(stripes(60, 40), orientation, kind)
    stored = Image.open(io.BytesIO(data))
    expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)
    np.testing.assert_array_equal(decode(data, exif=False), stored.convert("RGB"))
    assert traits(data) == Traits(60, 40, 2 <= orientation <= 8, False)
    for crop in ("center", "squash"):
        quick = fit_quickly(data, 20, crop).astype(int)
        assert np.abs(quick - fit(Image.fromarray(expected), 20, crop)).max() <= 1
    exact = ImageInput(size=20, crop="random")
    upright = encoded(Image.fromarray(expected))
    for epoch in range(3):
        got, want = (augment(d, exact, draw(0, epoch, "k")).astype(int) for d in (data, upright))
        assert np.abs(got - want).max() < 12, "only the scaled decode of a JPEG may differ"


def test_an_image_of_its_own_size_is_decoded_into_its_place_unless_it_is_turned() -> None:
    out = np.zeros((32, 32, 3), np.uint8)
    image = Inputs(ImageInput(size=32), None)
    for orientation in (1, 6):
        data = turned(stripes(32, 32), orientation, "JPEG")
        image.image_columns(data, draw(0, 0, "k"), {"pixels": out})
        np.testing.assert_array_equal(out, decode(data))
    straight = decode_jpeg(data, exif=False)
    assert straight is not None
    assert np.abs(straight.astype(int) - out).max() > 100


def test_a_damaged_exif_block_is_no_reason_to_refuse_a_photo() -> None:
    whole = turned(stripes(40, 30), 6, "JPEG")
    at = whole.index(b"Exif\0\0") + 6
    for broken in (whole[:at] + b"XX" + whole[at + 2 :], whole[:at] + bytes(12) + whole[at + 12 :]):
        assert decode(broken).size == (40, 30)
        assert fit_quickly(broken, 16, "center").shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_field_case_17_what_is_transparent_lies_over_white(mode: str) -> None:
    alpha = np.zeros((20, 20), np.uint8)
    alpha[5:15, 5:15] = 255
    rgba = Image.fromarray(np.dstack([np.full((20, 20, 3), 30, np.uint8), alpha]))
    if mode == "tRNS":
        flat = np.full((20, 20, 3), 30, np.uint8)
        flat[alpha == 0] = (255, 0, 0)
        data = encoded(Image.fromarray(flat), transparency=(255, 0, 0))
    else:
        data = encoded(rgba.convert(mode))
    pixels = np.asarray(decode(data)).astype(int)
    assert np.abs(pixels - np.where(alpha == 255, 30, 255)[..., None]).max() <= 8
    assert traits(data) == Traits(20, 20, False, True)


@pytest.mark.parametrize("alpha", [255, 0, 100])
def test_a_layer_that_is_opaque_everywhere_changes_no_value(alpha: int) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(np.dstack([colours, np.full((16, 16), alpha, np.uint8)])))
    expected = colours * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(np.asarray(decode(data)) - expected).max() <= (0 if alpha == 255 else 1)
