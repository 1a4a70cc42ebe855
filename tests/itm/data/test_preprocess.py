from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itm.config import Data, Text, parse_recipe
from itm.data.pixels import decode
from itm.data.preprocess import ImageInput, Inputs, augment, box_numbers, draw, fit, fit_quickly, read_regions
from itm.data.records import MAX_PIXELS, Regions
from itm.data.text import build_tokenizer
from tests.support import GOLDEN

PREPROCESSED = GOLDEN / "cusa/preprocess/clip_preprocess.npz"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind)
    return out.getvalue()


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def region_file(features: np.ndarray, boxes: np.ndarray, width: int = 100, height: int = 50) -> bytes:
    out = io.BytesIO()
    np.savez(out, features=features, boxes=boxes, width=width, height=height)
    return out.getvalue()


@pytest.mark.parametrize("name", ["small_wide", "big_tall", "exact224"])
@pytest.mark.parametrize("size", [224, 336])
def test_the_evaluation_path_equals_the_official_clip_preparation(name: str, size: int) -> None:
    golden = np.load(PREPROCESSED)
    pixels = fit(decode(encoded(golden[f"{name}_image"])), size, "center")
    normal = ((pixels.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(normal[:, :: size // 14, :: size // 14], golden[f"{name}_{size}_grid"], atol=1e-5)
    np.testing.assert_allclose(normal.mean((1, 2)), golden[f"{name}_{size}_channel_mean"], atol=1e-5)


def test_squash_keeps_the_whole_image() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 40:] = 255
    squashed = fit(Image.fromarray(pixels), 30, "squash")
    assert squashed.shape == (30, 30, 3)
    assert squashed[:, 25:].min() > 250
    assert squashed[:, :15].max() < 5


def test_the_random_numbers_depend_on_seed_epoch_and_key_alone() -> None:
    assert draw(1, 2, "k") == draw(1, 2, "k")
    assert len({draw(1, 2, "k"), draw(2, 2, "k"), draw(1, 3, "k"), draw(1, 2, "j")}) == 4
    areas = [draw(0, 0, str(i)).area for i in range(2000)]
    assert 0.47 < np.mean(areas) < 0.53


@pytest.mark.parametrize("crop", ["center", "squash"])
@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (90, 91), (32, 32)])
def test_the_quick_fit_of_a_jpeg_is_off_by_one_at_most(crop: str, shape: tuple[int, int]) -> None:
    coarse = Image.fromarray(picture(20, 30)).resize(shape[::-1], Image.Resampling.BICUBIC)
    data = encoded(np.asarray(coarse), "JPEG")
    quick, exact = fit_quickly(data, 64, crop).astype(int), fit(decode(data), 64, crop).astype(int)
    assert np.abs(quick - exact).max() <= 1
    assert (quick != exact).mean() < 0.02


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_whatever_the_decoder_of_training_refuses_is_left_to_that_of_evaluation(mode: str) -> None:
    out = io.BytesIO()
    Image.fromarray(picture(40, 48)).convert(mode).save(out, "JPEG", quality=95)
    whole = out.getvalue()
    numbers, image = draw(0, 0, "k"), ImageInput(size=32, crop="random")
    for data in (whole, whole + b"tail" * 20):
        np.testing.assert_allclose(fit_quickly(data, 32, "squash").astype(int), fit(decode(data), 32, "squash"), atol=1)
        augment(data, image, numbers)
    for look in (lambda data: fit_quickly(data, 32, "squash"), lambda data: augment(data, image, numbers)):
        with pytest.raises(ValueError, match="cannot decode image"):
            look(whole[: len(whole) // 2])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_random_crop_has_the_asked_size_and_changes_with_the_epoch(kind: str) -> None:
    image, data = ImageInput(size=32, crop="random"), encoded(picture(90, 120), kind)
    first, second = (augment(data, image, draw(0, epoch, "k")) for epoch in (0, 1))
    assert first.shape == second.shape == (32, 32, 3)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, augment(data, image, draw(0, 0, "k")))


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    image, pixels = ImageInput(size=16, flip=True), picture(16, 16)
    data, mirrored = encoded(pixels), 0
    for key in map(str, range(200)):
        got = augment(data, image, draw(0, 0, key))
        mirrored += np.array_equal(got, pixels[:, ::-1])
        assert np.array_equal(got, pixels) or np.array_equal(got, pixels[:, ::-1])
    assert 70 < mirrored < 130


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("data", [b"", b"no image", encoded(picture(64, 64), "JPEG")[:900], encoded(picture(64, 64))[:900]])
def test_bytes_that_are_no_whole_image_are_an_error_that_says_so(data: bytes, crop: str) -> None:
    with pytest.raises(ValueError, match="cannot decode image"):
        augment(data, ImageInput(size=16, crop=crop), draw(0, 0, "k"))


def test_an_image_that_promises_too_many_pixels_is_refused_unread() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG")
    with pytest.raises(ValueError, match="the limit is"):
        decode(out.getvalue())


def test_box_numbers_are_those_of_uniter() -> None:
    got = box_numbers(np.array([[10, 5, 60, 45]], np.float32), 100, 50)
    np.testing.assert_allclose(got, [[0.1, 0.1, 0.6, 0.9, 0.5, 0.8, 0.4]], rtol=1e-6)


def test_regions_are_padded_and_masked() -> None:
    features = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float16)
    got = read_regions(region_file(features, np.array([[0, 0, 10, 10]] * 3, np.float32)), limit=4)
    assert got["regions"].shape == (4, 5)
    assert got["boxes"].shape == (4, 7)
    np.testing.assert_array_equal(got["mask"], [True, True, True, False])
    np.testing.assert_array_equal(got["regions"][:3], features.astype(np.float32))
    assert not got["regions"][3].any()


@pytest.mark.parametrize(
    ("features", "boxes"),
    [
        (np.ones((3, 5)), np.ones((2, 4))),
        (np.ones((0, 5)), np.ones((0, 4))),
        (np.full((1, 5), np.nan), np.ones((1, 4))),
        (np.ones(5), np.ones(4)),
    ],
)
def test_region_files_of_wrong_shape_or_with_nan_are_refused(features: np.ndarray, boxes: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be|not finite"):
        read_regions(region_file(features, boxes), limit=4)


def test_a_region_file_without_boxes_has_zero_box_numbers() -> None:
    got = read_regions(Regions(np.ones((2, 5), np.float16)).to_npz(), limit=3)
    assert not got["boxes"].any()
    np.testing.assert_array_equal(got["mask"], [True, True, False])


def test_inputs_come_back_from_their_folder(tmp_path: Path) -> None:
    texts = ["a red circle", "a blue square left of a red ring"]
    inputs = Inputs(ImageInput(size=16, crop="squash"), build_tokenizer(Text(max_length=12), texts))
    inputs.save(tmp_path)
    again = Inputs.load(tmp_path)
    assert again.image == inputs.image
    assert torch.equal(again.captions(texts).tokens, inputs.captions(texts).tokens)
    raw = [encoded(picture(20, 30)), encoded(picture(30, 20))]
    images = again.images(raw)
    assert images.pixels is not None
    assert images.pixels.shape == (2, 3, 16, 16)
    assert images.pixels.dtype == torch.uint8
    assert torch.equal(images.pixels, inputs.images(raw).pixels)
    with pytest.raises(ValueError, match="image 1: cannot decode"):
        again.images([raw[0], b"x"])


@pytest.mark.parametrize("crop", ["center", "random", "squash"])
def test_field_case_06_grey_of_16_bits_is_scaled_and_not_cut_off(crop):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    wide, narrow = io.BytesIO(), io.BytesIO()
    Image.fromarray(ramp.astype(np.uint16)).save(wide, "PNG")
    Image.fromarray((ramp / 257).round().astype(np.uint8)).save(narrow, "PNG")
    eight, sixteen = (np.asarray(decode(data.getvalue()), np.int64) for data in (narrow, wide))
    assert sixteen.shape == (64, 64, 3)
    assert np.abs(sixteen - eight).max() <= 1
    made = [augment(data.getvalue(), ImageInput(size=16, crop=crop), draw(0, 0, "k")).astype(int) for data in (narrow, wide)]
    assert np.abs(made[0] - made[1]).max() <= 1


def test_exact_training_pixels_are_those_of_evaluation():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    image, numbers = ImageInput(size=32, exact=True), draw(0, 0, "k")
    inputs = Inputs(image, None)
    exact, plain = inputs.image_columns(stream.getvalue(), numbers)["pixels"], inputs.image_columns(stream.getvalue())["pixels"]
    assert np.array_equal(exact, plain)
    quick = augment(stream.getvalue(), ImageInput(size=32), numbers)
    assert 0 < (quick != exact).mean() < 0.2


@pytest.mark.parametrize("crop", ["center", "squash"])
@pytest.mark.parametrize("shape", [(192, 256), (300, 130), (1000, 700)])
def test_a_scaled_jpeg_differs_by_a_few_levels_from_two_times_the_size_on_and_not_at_all_below(crop: str, shape: tuple[int, int]) -> None:
    coarse = Image.fromarray(picture(9, 9)).resize(shape[::-1], Image.Resampling.BICUBIC)
    data = encoded(np.asarray(coarse), "JPEG")
    exact = fit(decode(data), 64, crop).astype(int)
    found = augment(data, ImageInput(size=64, crop=crop, scaled=True), draw(0, 0, "k")).astype(int)  # type: ignore[arg-type]
    difference = np.abs(found - exact)
    assert found.shape == (64, 64, 3)
    assert difference.max() > 1
    assert difference.mean() < 3
    large = min(shape) // 2 + 1
    assert np.array_equal(fit_quickly(data, large, crop, halving=True), fit_quickly(data, large, crop))


def test_scaled_pixels_are_a_choice_that_exact_ones_refuse() -> None:
    data = parse_recipe({"name": "a", "output": "runs", "model": {"kind": "dual"}, "data": {"scaled_jpeg": True}}).data
    assert ImageInput.of(data).scaled and "scaled" in ImageInput.of(data).said() and "scaled" not in ImageInput().said()
    with pytest.raises(ValueError, match="switch one of them off"):
        Data(scaled_jpeg=True, exact_pixels=True)
