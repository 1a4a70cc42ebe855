from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from itm.config import Part, Text
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import build_tokenizer
from itm.matchers.folder import build_matcher, load_matcher_folder, save_matcher
from tests.support.noise_split import png

DUAL = Part(kind="dual", options={"image": {"kind": "conv", "image_size": 16}, "text": {"kind": "pooled_gru"}, "width": 8})
TEXTS = ["a red circle", "a blue square over it"]


def inputs() -> Inputs:
    return Inputs(ImageInput(size=16, crop="squash"), build_tokenizer(Text(max_length=8), TEXTS))


def scores(matcher: torch.nn.Module) -> torch.Tensor:
    prepared: Inputs = matcher.inputs  # type: ignore[assignment]
    with torch.inference_mode():
        images = matcher.encode_images(prepared.images([png(0), png(1), png(2)]))  # type: ignore[operator]
        return matcher.score(images, matcher.encode_captions(prepared.captions(TEXTS)))  # type: ignore[operator]


def test_a_saved_matcher_scores_as_before(tmp_path: Path) -> None:
    matcher = build_matcher(DUAL, inputs()).eval()
    save_matcher(matcher, tmp_path / "deep" / "matcher")
    again = load_matcher_folder(tmp_path / "deep" / "matcher")
    assert not again.training
    assert torch.equal(scores(matcher), scores(again))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["matcher"]


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    save_matcher(build_matcher(DUAL, inputs()), tmp_path / "m")
    (tmp_path / "m" / "stale").touch()
    second = build_matcher(DUAL, inputs()).eval()
    save_matcher(second, tmp_path / "m")
    assert not (tmp_path / "m" / "stale").exists()
    assert torch.equal(scores(load_matcher_folder(tmp_path / "m")), scores(second))


def test_a_uri_holds_a_matcher_as_a_folder_does(tmp_path: Path) -> None:
    matcher = build_matcher(DUAL, inputs()).eval()
    save_matcher(matcher, f"file://{tmp_path}/m")
    assert torch.equal(scores(load_matcher_folder(f"file://{tmp_path}/m")), scores(matcher))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save_matcher(build_matcher(DUAL, inputs()), tmp_path / "m")
    assert {p.suffix for p in (tmp_path / "m").rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_a_folder_without_weights_is_refused_by_the_name_of_the_file(tmp_path: Path) -> None:
    save_matcher(build_matcher(DUAL, inputs()), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no matcher folder: model\.safetensors is missing"):
        load_matcher_folder(tmp_path / "m")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    save_matcher(build_matcher(DUAL, inputs()), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, this version reads up to 2"):
        load_matcher_folder(tmp_path / "m")


def test_an_unknown_model_option_names_the_near_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'width'"):
        build_matcher(Part(kind="dual", options={**DUAL.options, "widht": 3}), inputs())


@pytest.mark.parametrize(
    "part", [Part(kind="dual"), Part(kind="dual", options={"image": {"hidden": 8}}), Part(kind="scan", options={"image": {"kind": "conv"}})]
)
def test_the_conv_tower_follows_the_size_of_the_data_and_the_folder_keeps_it(tmp_path, part):
    matcher = build_matcher(part, Inputs(ImageInput(size=48), build_tokenizer(Text(), ["a dog"])))
    assert len(matcher.encode_images(matcher.inputs.images([png(0)] * 2))) == 2
    save_matcher(matcher, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["options"]["image"]["image_size"] == 48


def test_a_size_that_the_recipe_gives_is_kept():
    part = Part(kind="dual", options={"image": {"kind": "conv", "image_size": 32}})
    matcher = build_matcher(part, Inputs(ImageInput(size=48), build_tokenizer(Text(), ["a dog"])))
    with pytest.raises(ValueError, match=r"32 pixels a side got \(48, 48\)"):
        matcher.eval().encode_images(matcher.inputs.images([png(0)]))
