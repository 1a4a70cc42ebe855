"""CLIP through Hugging Face's CLIPModel, or with OpenAI's ResNet as its image tower, in float32, with CUSA's heads behind its projections.

Equations: docs/methods/dual.md#clip and docs/methods/cusa.md#student-model. The logit scale is dropped: temperatures belong to the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from itm.kinds import refuse_unknown
from itm.matchers.dual import Heads, Uni, cosines, read_heads
from itm.matchers.encoders.clip_resnet import CLIPResNet
from itm.matchers.encoders.towers import CLIP_PIXELS, Normalise, as_config, check_tokens, check_vocabulary, load_clip, pool_tokens
from itm.matchers.encoders.two_towers import features
from itm.types import Captions, Encoded, Images, Matcher, Options

NO_TRANSFORMER = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 8,
}
"""The smallest vision transformer, which is built and taken away again where a ResNet is wanted."""


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
        heads: Mapping[str, Uni] | None = None,
        gradient_checkpointing: bool = False,
        resnet: Options | None = None,
    ) -> None:
        """Raises ValueError unless exactly one of `path` and `config` is given, or when the tokenizer is not the model's.

        resnet: layers, width, heads and image_size of `CLIPResNet`, which takes the place of the vision transformer of `config`.
        """
        super().__init__()
        self.backbone: Any = load_clip(path, config if resnet is None or config is None else config | {"vision_config": NO_TRANSFORMER})
        if resnet is not None:
            self._convolve(resnet, path)
        del self.backbone.logit_scale
        check_vocabulary(vocab_size, self.backbone.config.text_config.vocab_size)
        if gradient_checkpointing:
            self.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        chosen = read_heads(heads)
        self.normalise = Normalise(*CLIP_PIXELS)
        self.vector_width = int(self.backbone.config.projection_dim)
        self.image_size = int(resnet["image_size"] if resnet else self.backbone.config.vision_config.image_size)
        self.uni_width = self.vector_width if chosen["uni"] else 0
        self.image_heads, self.text_heads = Heads(self.vector_width, **chosen), Heads(self.vector_width, **chosen)
        self.options = {"config": as_config(self.backbone), "heads": chosen, "gradient_checkpointing": gradient_checkpointing}
        if resnet is not None:
            self.options["resnet"] = resnet

    def _convolve(self, resnet: Options, path: str | None) -> None:
        """Convolutions in the place of the vision transformer and its projection."""
        wanted = ("layers", "width", "heads", "image_size")
        refuse_unknown(resnet, wanted, "resnet")
        if path is not None or resnet.keys() != set(wanted):
            raise ValueError(f"model clip: resnet needs {', '.join(wanted)}, and config in the place of path")
        self.backbone.vision_model = CLIPResNet(**resnet, projection=self.backbone.config.projection_dim)
        self.backbone.visual_projection = nn.Identity()

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
        pooled = features(self.backbone.vision_model(pixel_values=pixels))
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
