"""Any Hugging Face model of two towers (CLIP, SigLIP, ALIGN, ...): loading, its sizes, and adapters of low rank for fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from itm.extras import needed_by
from itm.kinds import refuse_unknown
from itm.matchers.encoders.towers import CLIP_PIXELS
from itm.types import Options

LORA = {"rank": 8, "alpha": 16, "layers": ["q_proj", "v_proj"]}
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Sizes:
    """What a model was trained on. image: pixels a side; text: tokens; crop: how images are brought to this size."""

    image: int
    text: int
    crop: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_two_towers(path: str | None, config: Options | None) -> Any:
    """The model in float32. Raises ValueError unless exactly one of both is given and names a model of two towers."""
    from transformers import AutoConfig, AutoModel

    if (path is None) == (config is None):
        raise ValueError("model hf_dual needs either path (hub name or folder) or config (a dict with model_type)")
    try:
        if config is not None:
            choices = dict(config)
            model: Any = AutoModel.from_config(AutoConfig.for_model(choices.pop("model_type"), **choices), dtype=torch.float32)
        else:
            model = AutoModel.from_pretrained(str(path), dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model hf_dual: {path or 'config'} holds no model: {str(error).splitlines()[0][:300]}") from None
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"model hf_dual: {path or 'config'} is a {model.config.model_type}, which has no image and text tower")
    return model


def sizes_of(path: str) -> Sizes:
    """Read from the model's configuration, without its weights. Raises ValueError as `load_two_towers`."""
    from transformers import AutoConfig
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found: Any = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no matcher folder and no Hugging Face model: {str(error).splitlines()[0][:300]}") from None
    if not (hasattr(found, "vision_config") and hasattr(found, "text_config")):
        raise ValueError(f"{path} is a {found.model_type}, not a model of an image and a text tower (CLIP, SigLIP, ...)")
    squash = not found.model_type.startswith("clip")
    try:
        processing, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except OSError:
        processing = {}
    mean, std = (HALF, HALF) if found.model_type.startswith("siglip") else CLIP_PIXELS
    return Sizes(
        int(found.vision_config.image_size),
        int(getattr(found.text_config, "max_position_embeddings", 64)),
        "center" if processing.get("do_center_crop", not squash) else "squash",
        tuple(processing.get("image_mean", mean)),
        tuple(processing.get("image_std", std)),
    )


def reads_padding(model: Any) -> bool:
    """SigLIP was trained on texts padded to their full length, without a mask."""
    return str(model.config.model_type).startswith("siglip")


def features(out: Any) -> Tensor:
    """(N,D) of what `get_image_features` and `get_text_features` give, in any version of transformers."""
    return out if isinstance(out, Tensor) else out.pooler_output


def add_adapters(model: nn.Module, given: Options) -> Options:
    """Freeze a model and put adapters of low rank beside the named linear layers; returns their full options.

    given: rank, alpha, layers (ends of the names of linear layers). Raises MissingExtra without peft, ValueError for another option.
    """
    refuse_unknown(given, LORA, "lora")
    options = {**LORA, **given}
    with needed_by("model.options.lora", extra="lora"):
        from peft import LoraConfig, inject_adapter_in_model
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=options["rank"], lora_alpha=options["alpha"], target_modules=list(options["layers"])), model)
    return options
