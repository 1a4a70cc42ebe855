"""A CLIP matcher as a folder that transformers' CLIPModel and CLIPProcessor load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from itm.data.text import HFTokenizer
from itm.matchers.clip import CLIP
from itm.matchers.encoders.towers import CLIP_PIXELS
from itm.types import Matcher


def write_huggingface(matcher: Matcher, folder: Path) -> None:
    """Fill `folder`. The scale of the logits, which a matcher does not have, is CLIP's initial one.

    Raises ValueError for another kind of matcher, for one with heads, and for a tokenizer that is not Hugging Face's.
    """
    if not isinstance(matcher, CLIP):
        raise ValueError(
            f"transformers has no class for a {matcher.kind} matcher; it has one for clip. Export to onnx, or load it with itm"
        )
    if "resnet" in matcher.options:
        raise ValueError("this CLIP has a ResNet as its image tower, which transformers' CLIPModel has not: export it to onnx")
    if matcher.options["heads"]["cross"]:
        raise ValueError("this CLIP scores through CUSA's cross heads, which CLIPModel has not: export it to onnx")
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = matcher.inputs.tokenizer
    if not isinstance(tokenizer, HFTokenizer):
        raise ValueError("this CLIP reads words of its own vocabulary, which transformers has not: export it to onnx")
    config = {key: value for key, value in matcher.options["config"].items() if key != "model_type"}
    model: Any = CLIPModel(CLIPConfig(**config))
    missing, unexpected = model.load_state_dict(matcher.backbone.state_dict(), strict=False)
    if missing != ["logit_scale"] or unexpected:
        raise ValueError(f"the weights do not fit CLIPModel: missing {missing}, unexpected {unexpected}")
    model.eval().save_pretrained(folder)
    mean, std = CLIP_PIXELS
    side, whole = matcher.inputs.image.size, matcher.inputs.image.crop == "squash"
    square = {"height": side, "width": side}
    images = CLIPImageProcessor(
        size=square if whole else {"shortest_edge": side},
        crop_size=square,
        do_center_crop=not whole,
        image_mean=list(mean),
        image_std=list(std),
    )
    CLIPProcessor(images, tokenizer.hf).save_pretrained(folder)
