"""data.cache_features: a frozen image tower is not run in training, and what is trained is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

import itm
from itm.config import Recipe, parse_recipe
from itm.matchers.encoders import features as towers
from itm.matchers.encoders.build import build_text_encoder
from itm.matchers.encoders.features import remember_captions
from pipelines import features as stage
from pipelines.train import train
from tests.support.hub_models import tokenizer
from tests.support.making_features import photos, without_ray
from tests.support.small_training import die_at, same
from tests.support.tower_inputs import BERT, VIT, captions


@pytest.fixture
def tower(tmp_path: Path) -> str:
    torch.manual_seed(4)
    folder = tmp_path / "vit"
    known = AutoConfig.for_model(**{**VIT, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2})
    AutoModel.from_config(known).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def words(tmp_path: Path) -> str:
    folder = tmp_path / "bert"
    folder.mkdir()
    size = len(tokenizer(folder))
    torch.manual_seed(4)
    AutoModel.from_config(AutoConfig.for_model(**{**BERT, "vocab_size": size})).save_pretrained(folder)
    return str(folder)


def recipe(root: Path, tower: str, cached: bool, name: str = "run", text: str | None = None, **more: Any) -> Recipe:
    image = {"kind": "hf_vision", "path": tower, "freeze": True, "cells": 2, **more.pop("image", {})}
    options: dict[str, Any] = {"image": image, "width": 8}
    if text:
        options["text"] = {"kind": "hf_text", "path": text, "freeze": True}
    data = {"root": str(root / "regions"), "image_size": 32, "crop": "squash", "val_split": "", "test_split": "train"}
    return parse_recipe(
        {
            "name": name,
            "output": str(root / "runs"),
            "data": {**data, "regions_dtype": "fp32", "cache_features": cached, **more.pop("data", {})},
            "features": {"photos": str(root / "photos")},
            "text": {"kind": "hf", "path": text} if text else {"max_length": 10},
            "model": {"kind": "dual", "options": options},
            "train": {"batch_size": 4, "steps": 6, "workers": 0, "checkpoint_every": 2, **more},
        }
    )


@pytest.fixture
def made(tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_ray(monkeypatch)
    photos(tmp_path / "photos")
    stage.features(recipe(tmp_path, tower, True))
    return tmp_path


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / "runs" / name / "matcher" / "model.safetensors")


def test_training_on_kept_features_ends_with_the_weights_of_training_on_photos(made: Path, tower: str):
    train(recipe(made, tower, True, "kept"))
    train(recipe(made, tower, False, "photos"))
    kept, photos_ = weights(made, "kept"), weights(made, "photos")
    assert kept.keys() == photos_.keys()
    assert max((kept[name] - photos_[name]).abs().max().item() for name in kept) < 2e-5


def test_the_matcher_that_comes_of_it_takes_photos(made: Path, tower: str):
    train(recipe(made, tower, True))
    matcher = itm.load_matcher(str(made / "runs" / "run" / "matcher"))
    assert (matcher.inputs.image.kind, matcher.inputs.image.size, matcher.inputs.image.crop) == ("pixels", 32, "squash")


def test_the_tower_is_not_run(made: Path, tower: str, monkeypatch: pytest.MonkeyPatch):
    from transformers import ViTModel

    def never(*given: object, **named: object) -> None:
        raise AssertionError("the image tower was run")

    monkeypatch.setattr(ViTModel, "forward", never)
    train(recipe(made, tower, True))


def test_captions_are_read_once_and_a_run_taken_up_again_ends_the_same(made: Path, tower: str, words: str, monkeypatch):
    monkeypatch.setattr(towers, "_kept", {})
    train(recipe(made, tower, True, "whole", words))
    (memory,) = towers._kept.values()
    assert len(memory.rows) == 12  # photos 0 to 5 have 1, 2, 3, 1, 2, 3 captions
    with monkeypatch.context() as patch:
        die_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(made, tower, True, "torn", words))
    monkeypatch.setattr(towers, "_kept", {})
    train(recipe(made, tower, True, "torn", words))
    assert same(weights(made, "whole"), weights(made, "torn"))


def test_a_memory_gives_what_the_tower_gives():
    torch.manual_seed(0)
    encoder = build_text_encoder("hf_text", vocab_size=20, config=BERT, freeze=True).train()
    given = captions()
    want = encoder(given)
    assert remember_captions(encoder, 10)
    for _ in range(2):
        found = encoder(given)
        assert (found.vector - want.vector).abs().max() < 1e-5
        assert ((found.parts - want.parts) * given.mask[..., None]).abs().max() < 1e-5


@pytest.mark.parametrize(("options", "count"), [({"freeze": False}, 10), ({"pool": "pooler"}, 10), ({}, 10**9)])
def test_a_tower_that_learns_or_whose_captions_do_not_fit_has_no_memory(options: dict[str, Any], count: int):
    encoder = build_text_encoder("hf_text", vocab_size=20, config=BERT, **{"freeze": True, **options})
    assert not remember_captions(encoder, count)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": {"freeze": False}}, "set model.options.image.freeze=true"),
        ({"image": {"cells": None}}, "of hf_vision also cells"),
        ({"image": {"cells": 4}}, r"are not of this image tower \(encoder differ\)"),
        ({"data": {"crop": "center"}}, r"are not of this image tower \(image differ\)"),
        ({"data": {"image": "regions"}}, "data.image=pixels"),
    ],
)
def test_features_of_another_tower_are_refused(made: Path, tower: str, change: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        train(recipe(made, tower, True, **change))


def test_photos_without_features_are_refused(tmp_path: Path, tower: str):
    photos(tmp_path / "photos")
    with pytest.raises(ValueError, match="holds no features; run `itm features`"):
        train(recipe(tmp_path, tower, True, data={"root": str(tmp_path / "photos")}))
