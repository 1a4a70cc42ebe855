"""CLIP state dicts under OpenAI's or Hugging Face's names, and CUSA's (OpenAI's names below `clip_model.` plus its projection heads).

All published CLIP and CUSA models have 64 numbers a head and QuickGELU; the other sizes come from the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from itm.importers.state import bare_tensors, fill, tensor_of
from itm.matchers.clip import CLIP
from itm.types import Matcher

HEAD_WIDTH = 64
RENAMED = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
CUSA_HEAD = re.compile(r"^(ln_)?(cross|uni)_(image|text)_projection\.(weight|bias)$")
NOT_THE_MATCHER = re.compile(
    r"(^|\.)(logit_scale|position_ids|input_resolution|context_length|vocab_size|attn_mask)$|^(cross_|uni_)?(the_softlabel_)?tau"
)
"""The temperature, index buffers, the causal mask that a TorchScript archive keeps, and CUSA's temperatures, which belong to its losses."""


def load_clip(state: Mapping[str, object], **needed: Any) -> Matcher:
    """The matcher of a flat state dict, float32, in evaluation mode. `needed`: vocab_size to be compared with the file.

    Raises ValueError naming missing or unexpected keys, or for another vocabulary size.
    """
    tensors = {key: value.float() for key, value in bare_tensors(state).items()}
    if any("visual.attnpool." in key for key in tensors):
        raise ValueError(
            "this is a ResNet CLIP (visual.attnpool): Hugging Face's CLIP, which this one is, has vision transformers only. Use ViT-B-32, "
            "ViT-B-16 or ViT-L-14"
        )
    own: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not NOT_THE_MATCHER.search(key):
            own |= _renamed(key, value)
    words = _backbone(own, "text_model.embeddings.token_embedding.weight").shape[0]
    if needed.get("vocab_size", words) != words:
        raise ValueError(f"the checkpoint embeds {words} tokens, the tokenizer has {needed['vocab_size']}: use its own tokenizer")
    heads = {name: f"image_heads.{name}.linear.weight" in own for name in ("cross", "uni")}
    matcher = CLIP(vocab_size=words, config=_config(own), heads=heads)
    fill(matcher, own)
    return matcher.eval()


def _renamed(key: str, value: Tensor) -> dict[str, Tensor]:
    head = CUSA_HEAD.match(key)
    if head:
        layer = "norm" if head[1] else "linear"
        return {f"{head[3]}_heads.{head[2]}.{layer}.{head[4]}": value}
    name = key
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    if key in ("visual.proj", "text_projection"):
        value = value.T.contiguous()
    packed = re.match(r"(.*)\.attn\.in_proj_(weight|bias)$", name)
    if packed:
        thirds = value.chunk(3)
        return {f"backbone.{packed[1]}.self_attn.{p}_proj.{packed[2]}": third.clone() for p, third in zip("qkv", thirds, strict=True)}
    return {f"backbone.{name}": value}


def _config(own: dict[str, Tensor]) -> dict[str, Any]:
    def layers(tower: str) -> int:
        return len({key.split(".")[4] for key in own if key.startswith(f"backbone.{tower}.encoder.layers.")})

    patches = _backbone(own, "vision_model.embeddings.patch_embedding.weight")
    positions = _backbone(own, "vision_model.embeddings.position_embedding.weight").shape[0] - 1
    text_positions, text_width = _backbone(own, "text_model.embeddings.position_embedding.weight").shape
    vision = {
        "hidden_size": patches.shape[0],
        "intermediate_size": _backbone(own, "vision_model.encoder.layers.0.mlp.fc1.weight").shape[0],
        "num_hidden_layers": layers("vision_model"),
        "num_attention_heads": max(1, patches.shape[0] // HEAD_WIDTH),
        "patch_size": patches.shape[-1],
        "image_size": round(positions**0.5) * patches.shape[-1],
    }
    text = {
        "vocab_size": _backbone(own, "text_model.embeddings.token_embedding.weight").shape[0],
        "hidden_size": text_width,
        "intermediate_size": _backbone(own, "text_model.encoder.layers.0.mlp.fc1.weight").shape[0],
        "num_hidden_layers": layers("text_model"),
        "num_attention_heads": max(1, text_width // HEAD_WIDTH),
        "max_position_embeddings": text_positions,
    }
    width = _backbone(own, "visual_projection.weight").shape[0]
    return {"vision_config": vision, "text_config": text, "projection_dim": width}


def _backbone(own: dict[str, Tensor], key: str) -> Tensor:
    return tensor_of(own, f"backbone.{key}", "CLIP (by Hugging Face's names)")
