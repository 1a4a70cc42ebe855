"""Heads and activation of a CLIP, which its tensors do not tell: read beside the weights, given, or asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from itm.importers.load import load_official
from itm.types import Captions, Images
from tests.support.openai_names import openai_names


def clip(width: int = 160, heads: tuple[int, int] = (2, 2), act: str = "gelu") -> CLIPModel:
    tower = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 1, "hidden_act": act}
    config = CLIPConfig(
        text_config={**tower, "num_attention_heads": heads[1], "vocab_size": 60, "max_position_embeddings": 9, "eos_token_id": 59},
        vision_config={**tower, "num_attention_heads": heads[0], "image_size": 32, "patch_size": 16},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # as initialised, activation and heads hardly matter
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def assert_equal_vectors(matcher: Any, model: CLIPModel) -> None:
    tokens = torch.tensor([[5, 6, 7, 59], [8, 9, 10, 59]])
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(torch.arange(2), pixels=pixels)
    with torch.no_grad():
        got = matcher.encode_captions(Captions(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(2))).vector
        want = model.text_projection(model.text_model(input_ids=tokens).last_hidden_state[:, -1])
        got_image = matcher.encode_images(images).vector
        want_image = model.visual_projection(model.vision_model(pixel_values=matcher.normalise(images)).pooler_output)
    torch.testing.assert_close(got, torch.nn.functional.normalize(want, dim=-1))
    torch.testing.assert_close(got_image, torch.nn.functional.normalize(want_image, dim=-1))


def test_field_case_08_the_config_beside_the_weights_is_read(tmp_path: Path) -> None:
    model = clip(heads=(4, 2))
    model.save_pretrained(tmp_path)
    assert_equal_vectors(load_official(tmp_path / "model.safetensors"), model)


def test_field_case_08_the_config_of_open_clip_is_read(tmp_path: Path) -> None:
    model = clip(width=128, heads=(2, 4))
    torch.save(openai_names(model), tmp_path / "open_clip_pytorch_model.bin")
    said = {"model_cfg": {"embed_dim": 24, "vision_cfg": {"width": 128}, "text_cfg": {"width": 128, "heads": 4}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(said))
    assert_equal_vectors(load_official(tmp_path / "open_clip_pytorch_model.bin"), model)


@pytest.mark.parametrize("names", ["openai", "huggingface"])
def test_field_case_08_heads_and_activation_are_taken_or_asked_for_and_never_guessed(tmp_path: Path, names: str) -> None:
    model = clip(heads=(5, 2))
    state = openai_names(model) if names == "openai" else model.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # of something else
    with pytest.raises(
        ValueError, match=r"do not tell num_attention_heads and hidden_act of the vision tower.*heads=<number>, hidden_act=gelu"
    ):
        load_official(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="do not tell hidden_act of the vision tower"):
        load_official(tmp_path / "a.safetensors", heads=[5, 2])
    with pytest.raises(ValueError, match="heads=3 do not divide the width 160 of the vision tower"):
        load_official(tmp_path / "a.safetensors", heads=3, hidden_act="gelu")
    assert_equal_vectors(load_official(tmp_path / "a.safetensors", heads=[5, 2], hidden_act="gelu"), model)
    with pytest.raises(ValueError, match="unknown option no_such_option: a CLIP checkpoint takes heads, hidden_act, vocab_size"):
        load_official(tmp_path / "a.safetensors", heads=4, no_such_option=1)
