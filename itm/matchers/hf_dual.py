"""Any Hugging Face model of two towers as a matcher, in float32: zero-shot, fine-tuned whole, by adapters, or by heads on frozen towers.

The scale and the bias of the logits do not change an order, so they are left out: temperatures belong to the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from itm.matchers.dual import Heads, Uni, cosines, read_heads
from itm.matchers.encoders.towers import Normalise, as_config, check_tokens, check_vocabulary
from itm.matchers.encoders.two_towers import HALF, add_adapters, features, load_two_towers, reads_padding, sizes_of
from itm.types import Captions, Encoded, Images, Matcher, Options


class More(TypedDict, total=False):
    """lora: {rank, alpha, layers}; pixels: mean and deviation of red, green and blue, known where a path is given."""

    lora: Options
    pixels: list[list[float]]


class HFDual(Matcher):
    """`path` (hub name or folder) or `config` (with model_type, random weights). score = cosine of the projected vectors.

    `freeze` leaves the towers as they are, so that only `heads` (as of `dual`) learn; `lora`, {rank, alpha, layers}, trains adapters in
    place of the towers' own weights.
    """

    kind: ClassVar[str] = "hf_dual"

    def __init__(
        self,
        *,
        vocab_size: int,
        path: str | None = None,
        config: Options | None = None,
        heads: Mapping[str, Uni] | None = None,
        freeze: bool = False,
        **more: Unpack[More],
    ) -> None:
        """Raises ValueError unless exactly one of `path` and `config` is given, and for a tokenizer of more ids than the model embeds."""
        super().__init__()
        lora, pixels = more.get("lora"), more.get("pixels")
        self.backbone: Any = load_two_towers(path, config)
        for name in ("logit_scale", "logit_bias"):
            if hasattr(self.backbone, name):
                delattr(self.backbone, name)
        text: Any = self.backbone.config.text_config
        check_vocabulary(vocab_size, text.vocab_size)
        found = None if path is None else sizes_of(path)
        pixels = pixels or ([list(found.mean), list(found.std)] if found else [list(HALF), list(HALF)])
        self.normalise, self.frozen = Normalise(*map(tuple, pixels)), freeze
        self.padded = int(text.max_position_embeddings) if reads_padding(self.backbone) else 0
        self.options = {"config": as_config(self.backbone), "heads": read_heads(heads), "freeze": freeze, "pixels": pixels}
        if freeze:
            self.backbone.requires_grad_(False)
        if lora is not None:
            self.options["lora"] = add_adapters(self.backbone, lora)
        self.vector_width = _width_of(self.backbone)
        self.uni_width = self.vector_width if self.options["heads"]["uni"] else 0
        self.image_heads, self.text_heads = (Heads(self.vector_width, **self.options["heads"]) for _ in range(2))
        if freeze and lora is None and True not in self.options["heads"].values():
            self.image_heads.requires_grad_(False)

    def train(self, mode: bool = True) -> HFDual:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def layers(self) -> list[nn.Module]:
        return [self.backbone.vision_model, self.backbone.text_model]

    def encoders(self) -> dict[str, nn.Module]:
        return {"image": self.backbone.vision_model, "text": self.backbone.text_model}

    def encode_images(self, images: Images) -> Encoded:
        """Raises ValueError when the pixels are not the size that the model was trained for."""
        pixels = self.normalise(images)
        size = self.backbone.config.vision_config.image_size
        if pixels.shape[-2:] != (size, size):
            raise ValueError(f"the model reads {size} pixels a side, got {tuple(pixels.shape[-2:])}: set data.image_size={size}")
        return self.image_heads(features(self.backbone.get_image_features(pixel_values=pixels)))

    def encode_captions(self, captions: Captions) -> Encoded:
        """Raises ValueError for captions longer than the model reads, and as `check_tokens`."""
        text: Any = self.backbone.config.text_config
        check_tokens(captions, text.vocab_size)
        if captions.tokens.shape[1] > text.max_position_embeddings:
            longest = text.max_position_embeddings
            raise ValueError(f"the model reads {longest} tokens, got {captions.tokens.shape[1]}: set text.max_length={longest}")
        if self.padded:
            tokens = captions.tokens.new_full((len(captions.tokens), self.padded), int(text.pad_token_id or 0))
            tokens[:, : captions.tokens.shape[1]] = captions.tokens.where(captions.mask, tokens[:, : captions.tokens.shape[1]])
            return self.text_heads(features(self.backbone.get_text_features(input_ids=tokens)))
        found = self.backbone.get_text_features(input_ids=captions.tokens, attention_mask=captions.mask.long())
        return self.text_heads(features(found))

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T) cosines."""
        return cosines(images, captions)


def _width_of(backbone: Any) -> int:
    """Of the vectors, which the configuration of one family calls another name than that of the next."""
    size = backbone.config.vision_config.image_size
    with torch.no_grad():
        return int(features(backbone.eval().get_image_features(pixel_values=torch.zeros(1, 3, size, size))).shape[-1])
