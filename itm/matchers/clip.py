"""CLIP through Hugging Face's CLIPModel, in float32, with CUSA's cross and uni heads behind its projections.

Equations: docs/methods/dual.md#clip and docs/methods/cusa.md#student-model. The logit scale is dropped: temperatures belong to the method.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from itm.matchers.dual import Heads, cosines, read_heads
from itm.matchers.encoders.towers import CLIP_PIXELS, Normalise, as_config, check_tokens, check_vocabulary, load_clip, pool_tokens
from itm.types import Captions, Encoded, Images, Matcher, Options


class CLIP(Matcher):
    """`path` (hub name or folder, e.g. openai/clip-vit-base-patch32) or `config` (of CLIPConfig, random weights). score = cosine.

    Without heads the vectors are CLIP's own. Parameters: 152 M (ViT-B/32 with four heads).
    """

    kind: ClassVar[str] = "clip"

    def __init__(
        self,
        *,
        vocab_size: int,
        path: str | None = None,
        config: Options | None = None,
        heads: dict[str, bool] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Raises ValueError unless exactly one of `path` and `config` is given, or when the tokenizer is not the model's."""
        super().__init__()
        self.backbone: Any = load_clip(path, config)
        del self.backbone.logit_scale
        check_vocabulary(vocab_size, self.backbone.config.text_config.vocab_size)
        if gradient_checkpointing:
            self.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        heads = read_heads(heads)
        self.normalise = Normalise(*CLIP_PIXELS)
        self.vector_width = int(self.backbone.config.projection_dim)
        self.image_size = int(self.backbone.config.vision_config.image_size)
        self.uni_width = self.vector_width if heads["uni"] else 0
        self.image_heads, self.text_heads = Heads(self.vector_width, **heads), Heads(self.vector_width, **heads)
        self.options = {"config": as_config(self.backbone), "heads": heads, "gradient_checkpointing": gradient_checkpointing}

    def layers(self) -> list[nn.Module]:
        return [self.backbone.vision_model, self.backbone.text_model]

    def encoders(self) -> dict[str, nn.Module]:
        return {"image": self.backbone.vision_model, "text": self.backbone.text_model}

    def encode_images(self, images: Images) -> Encoded:
        """Raises ValueError when the pixels are not the size that the model was trained for."""
        size = self.image_size
        pixels = self.normalise(images)
        if pixels.shape[-2:] != (size, size):
            raise ValueError(f"CLIP for {size} pixels a side got {tuple(pixels.shape[-2:])}: set data.image_size={size}")
        pooled = self.backbone.vision_model(pixel_values=pixels).pooler_output
        return self.image_heads(self.backbone.visual_projection(pooled))

    def encode_captions(self, captions: Captions) -> Encoded:
        """The state of the last real token (CLIP's end token), projected. Raises ValueError for long captions and as `check_tokens`."""
        check_tokens(captions, self.backbone.config.text_config.vocab_size)
        longest = self.backbone.config.text_config.max_position_embeddings
        if captions.tokens.shape[1] > longest:
            raise ValueError(f"CLIP reads {longest} tokens, got {captions.tokens.shape[1]}: set text.max_length={longest}")
        states = self.backbone.text_model(input_ids=captions.tokens, attention_mask=captions.mask.long()).last_hidden_state
        return self.text_heads(self.backbone.text_projection(pool_tokens(states, captions.mask, "last")))

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T) cosines."""
        return cosines(images, captions)
