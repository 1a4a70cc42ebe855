"""A single-stream matcher that is not UNITER: one Transformer reads image parts and words of a pair, a linear layer scores it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from itm.matchers.encoders.build import build_image_encoder
from itm.types import Captions, Encoded, Images, Matcher


class CrossEncoder(Matcher):
    joint: ClassVar[bool] = True
    image_kind: ClassVar[str | None] = "conv"

    def __init__(self, *, vocab_size: int, image: dict[str, Any] | None = None, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        image = image or {"kind": self.image_kind}
        self.options = {"image": image, "width": width, "depth": depth}
        self.look = build_image_encoder(**image)
        self.place = nn.Linear(self.look.width, width)
        self.words = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True) for _ in range(depth))
        self.verdict = nn.Linear(width, 1)

    def layers(self) -> list[nn.Module]:
        return [self.look, *self.blocks]

    def encode_images(self, images: Images) -> Encoded:
        seen = self.look(images)
        mask = seen.mask if seen.mask is not None else seen.parts.new_ones(seen.parts.shape[:2], dtype=torch.bool)
        return Encoded(parts=self.place(seen.parts), mask=mask)

    def encode_captions(self, captions: Captions) -> Encoded:
        return Encoded(parts=self.words(captions.tokens), mask=captions.mask)

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T): a joint forward pass for each pair."""
        rows = [self._read(images[row : row + 1], captions) for row in range(len(images))]
        return torch.stack(rows)

    def _read(self, image: Encoded, captions: Encoded) -> Tensor:
        """(T,) of one image."""
        count = len(captions)
        hidden = torch.cat([image.parts.expand(count, -1, -1), captions.parts], 1)
        absent = ~torch.cat([image.mask.expand(count, -1), captions.mask], 1)
        for block in self.blocks:
            hidden = block(hidden, src_key_padding_mask=absent)
        return self.verdict(hidden[:, 0]).squeeze(-1)
