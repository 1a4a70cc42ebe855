"""What the teachers of Hugging Face share: loading, the layer and the pooling that were asked for, identity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itm.data.formats import Json
from itm.data.text import brief
from itm.matchers.weights import tensors_sha256
from itm.teachers.identity import Precision, json_sha256

TORCH_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OF_THE_OUTPUT = ("pooler", "joint")
"""Poolings that the model does itself, of its final output."""


def load_hf(path: str, revision: str | None, precision: Precision, pooler: bool) -> nn.Module:
    """A Hugging Face model in eval mode. Raises ValueError when there is none, or when weights it needs are absent.

    Absent weights would be drawn at random: another teacher at each load. An absent pooler that is not used is dropped. Of a text model
    with a decoder (T5) the encoder is taken.
    """
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # a stage has its own
    try:
        half: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(AutoConfig.from_pretrained(path, revision=revision)), None)
        kind: Any = half if half is not None and half.__name__.endswith("EncoderModel") else AutoModel
        model, info = kind.from_pretrained(path, revision=revision, dtype=TORCH_DTYPE[precision], output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"teacher path {path!r} holds no Hugging Face model: {brief(error)}") from None
    absent = sorted(info["missing_keys"])
    unused = [name for name in absent if not pooler and "pooler." in name]
    if len(unused) < len(absent):
        raise ValueError(f"teacher path {path!r} lacks the weights {', '.join(absent[:3])}; they would be random. Choose another pooling")
    for name in {name.split("pooler.")[0] + "pooler" for name in unused}:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, None)
    return model.eval().requires_grad_(False)


def check_pooling(pooling: str, known: Sequence[str], layer: int) -> None:
    """Raises ValueError for an unknown pooling, or one of the final output together with another layer."""
    if pooling not in known:
        raise ValueError(f"pooling {pooling!r}; known: {', '.join(known)}")
    if pooling in OF_THE_OUTPUT and layer != -1:
        raise ValueError(f"pooling {pooling!r} is of the final output; leave layer at -1")


def layer_of(output: Any, layer: int) -> Tensor:
    """The tokens (N, T, D), or the map (N, C, h, w), of a layer; -1 is the final output. Raises ValueError for one that is not there."""
    if layer == -1:
        return output.last_hidden_state
    if not -len(output.hidden_states) <= layer < len(output.hidden_states):
        raise ValueError(f"layer {layer}: the model has the hidden states 0 to {len(output.hidden_states) - 1}, and -1, its final output")
    return output.hidden_states[layer]


def pooled(features: Any) -> Tensor:
    """(N, D) of `get_image_features` or `get_text_features`, which give a tensor or an output that holds it."""
    return features if isinstance(features, Tensor) else features.pooler_output


def model_identity(path: str, module: nn.Module, revision: str | None) -> Json:
    """Name without the place it lies in, revision, weights and architecture of a Hugging Face model."""
    config: Any = module.config
    settings = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")}
    return {
        "model": Path(path).resolve().name if Path(path).exists() else path,
        "revision": revision or getattr(config, "_commit_hash", None),
        "weights_sha256": tensors_sha256(module),
        "config_sha256": json_sha256(settings),
    }
