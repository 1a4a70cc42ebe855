"""Image and text encoders by kind, shared by every matcher.

An encoder is an `nn.Module` called as `encoder(Images | Captions) -> Encoded`; it has `width` (of `parts` (N,K,width)) and
`vector_width` (of `vector` (N,vector_width)), either 0 when it does not offer that view. Nothing is L2-normalised unless asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from itm.kinds import Kinds, build_part
from itm.types import Encoded, Options


class Encoder(nn.Module):
    """What every encoder is: called with `Images` or `Captions`, it gives `Encoded`.

    width: of `parts`, vector_width: of `vector`, 0 where it does not offer that view. options: what rebuilds it, without a network where
    it came from a path; None = the options it was given. unit_parts: its parts are normalised as its own options say (the SCAN family).
    frozen: its weights never learn. reads_features: it also takes, from `Images.regions`, the parts that it gave earlier.
    """

    width: int
    vector_width: int
    options: Options | None = None
    unit_parts: bool = False
    frozen: bool = False

    @property
    def reads_features(self) -> bool:
        return False

    if TYPE_CHECKING:

        def __call__(self, rows: Any) -> Encoded: ...


IMAGE_ENCODERS: Kinds[Encoder] = Kinds(
    "itm.matchers.encoders.build:Encoder",
    {
        "conv": "itm.matchers.encoders.towers:ConvTower",
        "hf_vision": "itm.matchers.encoders.towers:HFVision",
        "regions": "itm.matchers.encoders.regions:RegionProjection",
        "efficientnet_lite0": "itm.matchers.encoders.efficientnet:EfficientNetLite0",
    },
)
TEXT_ENCODERS: Kinds[Encoder] = Kinds(
    "itm.matchers.encoders.build:Encoder",
    {
        "gru": "itm.matchers.encoders.gru:WordGRU",
        "pooled_gru": "itm.matchers.encoders.towers:PooledGRU",
        "hf_text": "itm.matchers.encoders.towers:HFText",
    },
)


def build_image_encoder(kind: str, **options: Any) -> Encoder:
    """Raises ValueError for an unknown kind or option."""
    return build_part(IMAGE_ENCODERS, kind, options, "image encoder")


def build_text_encoder(kind: str, *, vocab_size: int, **options: Any) -> Encoder:
    """`vocab_size` comes from the tokenizer. Raises ValueError for an unknown kind or option."""
    return build_part(TEXT_ENCODERS, kind, options, "text encoder", vocab_size=vocab_size)


def options_of(encoder: Encoder, given: Options) -> Options:
    """The options that rebuild an encoder, without its kind; `given` where it does not say."""
    return {name: value for name, value in (given if encoder.options is None else encoder.options).items() if name != "kind"}


def layers_of(tower: nn.Module) -> list[nn.Module]:
    """The repeated layers of a Hugging Face tower, tensors in and out, none inside another; of any other tower none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(tower, GradientCheckpointingLayer):
        return [tower]
    return [layer for module in tower.children() for layer in layers_of(module)]


def keep_less(tower: nn.Module) -> bool:
    """Let a Hugging Face tower run its layers again in the backward pass instead of keeping their activations; False for any other."""
    from transformers import PreTrainedModel

    model: Any = next((m for m in tower.modules() if isinstance(m, PreTrainedModel)), None)
    if model is None or not model.supports_gradient_checkpointing:
        return False
    model.config.use_cache = False  # of generated text: no encoder has one, but some warn
    # The name of older releases warns in newer ones.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return True
