"""A tiny CLIP and its state dict under OpenAI's names, and OpenAI's own class."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel


def openai_names(model: CLIPModel) -> dict[str, torch.Tensor]:
    """The state dict of a Hugging Face CLIP under OpenAI's names, q, k and v packed; written independently of the reader's table."""
    out: dict[str, torch.Tensor] = {}
    for tower, prefix in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        for n, layer in enumerate(getattr(model, tower).encoder.layers):
            p, attention = f"{prefix}.resblocks.{n}", layer.self_attn
            for kind in ("weight", "bias"):
                out[f"{p}.attn.in_proj_{kind}"] = torch.cat([getattr(getattr(attention, f"{x}_proj"), kind) for x in "qkv"])
                names = {"attn.out_proj": attention.out_proj, "ln_1": layer.layer_norm1, "ln_2": layer.layer_norm2}
                names |= {"mlp.c_fc": layer.mlp.fc1, "mlp.c_proj": layer.mlp.fc2}
                out |= {f"{p}.{name}.{kind}": getattr(module, kind) for name, module in names.items()}
    vision, text = model.vision_model, model.text_model
    out["visual.class_embedding"] = vision.embeddings.class_embedding
    out["visual.conv1.weight"] = vision.embeddings.patch_embedding.weight
    out["visual.positional_embedding"] = vision.embeddings.position_embedding.weight
    out["token_embedding.weight"] = text.embeddings.token_embedding.weight
    out["positional_embedding"] = text.embeddings.position_embedding.weight
    norms = {"visual.ln_pre": vision.pre_layrnorm, "visual.ln_post": vision.post_layernorm, "ln_final": text.final_layer_norm}
    out |= {f"{name}.{kind}": getattr(norm, kind) for name, norm in norms.items() for kind in ("weight", "bias")}
    out["visual.proj"], out["text_projection"] = model.visual_projection.weight.T, model.text_projection.weight.T
    out["logit_scale"] = model.logit_scale
    return {key: value.detach().clone() for key, value in out.items()}


def tiny_clip() -> CLIPModel:
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 60, "max_position_embeddings": 9, "eos_token_id": 59},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=24,
    )
    return CLIPModel(config).eval()


def openai_class() -> Any:
    """The model class of the package openai-clip, whose own import may need packages that are gone."""
    found = importlib.util.find_spec("clip")
    if found is None or not found.submodule_search_locations:
        pytest.skip("openai-clip is not installed")
    spec = importlib.util.spec_from_file_location("openai_clip_model", Path(found.submodule_search_locations[0]) / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CLIP
