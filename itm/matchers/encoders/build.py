"""Image and text encoders by kind, shared by every matcher.

An encoder is an `nn.Module` called as `encoder(Images | Captions) -> Encoded`; it has `width` (of `parts` (N,K,width)) and
`vector_width` (of `vector` (N,vector_width)), either 0 when it does not offer that view. Nothing is L2-normalised unless asked.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from itm.kinds import Kinds, build_part

IMAGE_ENCODERS: Kinds[nn.Module] = Kinds(
    "torch.nn:Module",
    {
        "conv": "itm.matchers.encoders.towers:ConvTower",
        "hf_vision": "itm.matchers.encoders.towers:HFVision",
        "regions": "itm.matchers.encoders.regions:RegionProjection",
    },
)
TEXT_ENCODERS: Kinds[nn.Module] = Kinds(
    "torch.nn:Module",
    {
        "gru": "itm.matchers.encoders.gru:WordGRU",
        "pooled_gru": "itm.matchers.encoders.towers:PooledGRU",
        "hf_text": "itm.matchers.encoders.towers:HFText",
    },
)


def build_image_encoder(kind: str, **options: Any) -> nn.Module:
    """Raises ValueError for an unknown kind or option."""
    return build_part(IMAGE_ENCODERS, kind, options, "image encoder")


def build_text_encoder(kind: str, *, vocab_size: int, **options: Any) -> nn.Module:
    """`vocab_size` comes from the tokenizer. Raises ValueError for an unknown kind or option."""
    return build_part(TEXT_ENCODERS, kind, options, "text encoder", vocab_size=vocab_size)


def towers_of(matcher: nn.Module) -> list[nn.Module]:
    """The encoders of a matcher, each of them an `nn.Module` that is called; CLIP's are the two towers of its backbone."""
    backbone: Any = getattr(matcher, "backbone", None)
    if backbone is not None:
        return [backbone.vision_model, backbone.text_model]
    return [module for module in matcher.children() if hasattr(module, "vector_width")]


def layers_of(tower: nn.Module) -> list[nn.Module]:
    """The repeated layers of a Hugging Face tower, tensors in and out, none inside another; of any other tower none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(tower, GradientCheckpointingLayer):
        return [tower]
    return [layer for module in tower.children() for layer in layers_of(module)]


def joint_layers(matcher: nn.Module) -> list[Any]:
    """The layers of a single-stream matcher, run as `feed_forward_chunk(attention(...))`; of any other matcher none."""
    return list(matcher.uniter.encoder.layer) if hasattr(matcher, "pairs") else []  # type: ignore[union-attr,arg-type]
