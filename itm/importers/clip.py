"""CLIP state dicts under OpenAI's or Hugging Face's names, and CUSA's (OpenAI's names below `clip_model.` plus its projection heads).

Sizes come from the tensors, which do not tell the number of heads and the activation: the config.json of Hugging Face or the
open_clip_config.json beside the file does, or the options `heads` and `hidden_act`. Without them only OpenAI's names are read, and CUSA's,
at the widths that OpenAI published: with 64 numbers a head and QuickGELU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from itm.data import files
from itm.data.sources.source import read_json
from itm.importers.state import bare_tensors, check_options, fill, tensor_of
from itm.matchers.clip import CLIP
from itm.matchers.encoders.clip_resnet import STRIDE
from itm.types import Matcher, Options

HEAD_WIDTH = 64
PUBLISHED = (64, 512, 768, 1024)
"""Widths of OpenAI's towers, and one head alone."""
PUBLISHED_WITH_RESNETS = (64, 512, 640, 768, 1024, 2048, 2560, 3072, 4096)
"""Those of the text towers of its ResNets, and of their last grids."""
SETTINGS = ("config.json", "open_clip_config.json")
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


def load_clip(state: Mapping[str, object], settings: Options | None = None, **needed: Any) -> Matcher:
    """The matcher of a flat state dict, float32, in evaluation mode. settings: as `settings_beside` finds them.

    `needed`: `heads` (a number, or [vision, text]) and `hidden_act`, which overrule the settings; vocab_size to be compared with the file.
    Raises ValueError naming missing or unexpected keys and options, for another vocabulary size, and where heads or activation cannot be
    told.
    """
    check_options(needed, ("heads", "hidden_act", "vocab_size"), "CLIP")
    tensors = {key: value.float() for key, value in bare_tensors(state).items()}
    convolves = any(key.startswith("visual.attnpool.") for key in tensors)
    own: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if NOT_THE_MATCHER.search(key):
            continue
        if convolves and key.startswith("visual."):
            own[f"backbone.vision_model.{key.removeprefix('visual.')}"] = value
        else:
            own |= _renamed(key, value)
    words = _backbone(own, "text_model.embeddings.token_embedding.weight").shape[0]
    if needed.get("vocab_size", words) != words:
        raise ValueError(f"the checkpoint embeds {words} tokens, the tokenizer has {needed['vocab_size']}: use its own tokenizer")
    heads = {name: f"image_heads.{name}.linear.weight" in own for name in ("cross", "uni")}
    published = () if not any(".resblocks." in key for key in tensors) else PUBLISHED_WITH_RESNETS if convolves else PUBLISHED
    towers = _towers(settings or {}, needed)
    tower = (_resnet if convolves else _vision)(own, towers["vision"], published)
    config = {"text_config": _text(own, towers["text"], published), "projection_dim": _backbone(own, "text_projection.weight").shape[0]}
    options: Options = {"config": config, "resnet": tower} if convolves else {"config": config | {"vision_config": tower}}
    matcher = CLIP(vocab_size=words, heads=heads, **options)
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


def settings_beside(path: str | Path) -> Options | None:
    """What the config.json or open_clip_config.json in the folder of a checkpoint says, where it is one of a CLIP; else None."""
    for name in SETTINGS:
        file = Path(files.absolute(path)).parent / name
        if file.exists():
            said = read_json(file)
            if isinstance(said, dict) and ("model_cfg" in said or {"text_config", "vision_config"} & said.keys()):
                return said
    return None


def _towers(settings: Options, needed: Options) -> dict[str, Options]:
    """What is known of each tower beside its tensors: num_attention_heads, hidden_act, layer_norm_eps."""
    towers: dict[str, Options] = {"vision": {}, "text": {}}
    if model := settings.get("model_cfg"):
        activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
        vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
        wide = vision.get("width", 768) * (STRIDE if isinstance(vision.get("layers"), list) else 1)  # four stages: a ResNet
        heads = {"vision": wide // vision.get("head_width", HEAD_WIDTH), "text": text.get("heads", 8)}
        towers = {tower: {"num_attention_heads": heads[tower], "hidden_act": activation} for tower in towers}
    elif settings:
        from transformers import CLIPTextConfig, CLIPVisionConfig

        for tower, kind in (("vision", CLIPVisionConfig), ("text", CLIPTextConfig)):
            said = kind(**settings.get(f"{tower}_config") or {})
            towers[tower] = {name: getattr(said, name) for name in ("num_attention_heads", "hidden_act", "layer_norm_eps")}
    if "heads" in needed:
        both = needed["heads"] if isinstance(needed["heads"], list | tuple) else [needed["heads"]] * 2
        for tower, heads in zip(("vision", "text"), both, strict=True):
            towers[tower]["num_attention_heads"] = heads
    if "hidden_act" in needed:
        towers = {tower: said | {"hidden_act": needed["hidden_act"]} for tower, said in towers.items()}
    return towers


def _told(tower: str, width: int, said: Options, published: tuple[int, ...]) -> Options:
    """Heads and activation of a tower. Raises ValueError rather than guess, and for heads that do not divide the width.

    published: widths at which OpenAI's choices are taken.
    """
    known = {"num_attention_heads": width // HEAD_WIDTH, "hidden_act": "quick_gelu"} if width in published else {}
    known |= said
    if absent := [name for name in ("num_attention_heads", "hidden_act") if name not in known]:
        options = ", ".join(
            {"num_attention_heads": "heads=<number>", "hidden_act": "hidden_act=gelu or quick_gelu"}[name] for name in absent
        )
        raise ValueError(
            f"the tensors do not tell {' and '.join(absent)} of the {tower} tower: put its config.json beside it, or give {options}"
        )
    heads = known["num_attention_heads"]
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"heads={heads} do not divide the width {width} of the {tower} tower")
    return known


def _layers(own: dict[str, Tensor], tower: str) -> int:
    return len({key.split(".")[4] for key in own if key.startswith(f"backbone.{tower}.encoder.layers.")})


def _vision(own: dict[str, Tensor], said: Options, published: tuple[int, ...]) -> Options:
    """The vision_config of a CLIPConfig."""
    patches = _backbone(own, "vision_model.embeddings.patch_embedding.weight")
    positions = _backbone(own, "vision_model.embeddings.position_embedding.weight").shape[0] - 1
    return {
        "hidden_size": patches.shape[0],
        "intermediate_size": _backbone(own, "vision_model.encoder.layers.0.mlp.fc1.weight").shape[0],
        "num_hidden_layers": _layers(own, "vision_model"),
        **_told("vision", patches.shape[0], said, published),
        "patch_size": patches.shape[-1],
        "image_size": round(positions**0.5) * patches.shape[-1],
    }


def _resnet(own: dict[str, Tensor], said: Options, published: tuple[int, ...]) -> Options:
    """The option `resnet` of the matcher."""
    cells, grid_width = _backbone(own, "vision_model.attnpool.positional_embedding").shape
    stages = [{key.split(".")[3] for key in own if key.startswith(f"backbone.vision_model.layer{n}.")} for n in (1, 2, 3, 4)]
    return {
        "layers": [len(blocks) for blocks in stages],
        "width": _backbone(own, "vision_model.layer1.0.conv1.weight").shape[0],
        "heads": _told("vision", grid_width, {"hidden_act": "relu", **said}, published)["num_attention_heads"],
        "image_size": round((cells - 1) ** 0.5) * STRIDE,
    }


def _text(own: dict[str, Tensor], said: Options, published: tuple[int, ...]) -> Options:
    """The text_config of a CLIPConfig."""
    positions, width = _backbone(own, "text_model.embeddings.position_embedding.weight").shape
    return {
        "vocab_size": _backbone(own, "text_model.embeddings.token_embedding.weight").shape[0],
        "hidden_size": width,
        "intermediate_size": _backbone(own, "text_model.encoder.layers.0.mlp.fc1.weight").shape[0],
        "num_hidden_layers": _layers(own, "text_model"),
        **_told("text", width, said, published),
        "max_position_embeddings": positions,
    }


def _backbone(own: dict[str, Tensor], key: str) -> Tensor:
    return tensor_of(own, f"backbone.{key}", "CLIP (by Hugging Face's names)")
