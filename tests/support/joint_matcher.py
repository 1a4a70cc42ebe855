"""A joint matcher that is not UNITER: regions and words of a pair through layers of its own, declared as any matcher declares them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from itm.matchers.joint.pairs import joint_sequence, parts_of, relation_blocks, scaled_products
from itm.types import Captions, Encoded, Images, Matcher, Pairs


class Block(nn.Module):
    """One head of attention and a feed-forward layer, each with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.inner, self.outer, self.norm, self.dropout = (
            nn.Linear(width, 8 * width),
            nn.Linear(8 * width, width),
            nn.LayerNorm(width),
            nn.Dropout(0.2),
        )

    def forward(self, hidden: Tensor, mask: Tensor, products_of: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        products = None if products_of is None else scaled_products(hidden[products_of], self.query, self.key, heads=1)
        logits = (self.query(hidden) @ self.key(hidden).mT).masked_fill(~mask[:, None], -torch.inf)
        hidden = hidden + self.dropout(logits.softmax(-1) @ self.value(hidden))
        return self.norm(hidden + self.outer(self.inner(hidden).relu())), products


class Crossed(Matcher):
    kind: ClassVar[str] = "crossed"
    joint: ClassVar[bool] = True

    def __init__(self, *, vocab_size: int, region_dim: int = 6, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.options = {"region_dim": region_dim, "width": width, "depth": depth}
        self.look, self.read = nn.Linear(region_dim, width), nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.verdict = nn.Linear(width, 1)
        self.vector_width = width

    def layers(self) -> list[nn.Module]:
        return list(self.blocks)

    def encode_images(self, images: Images) -> Encoded:
        assert images.regions is not None
        return Encoded(parts=self.look(images.regions.to(self.look.weight.dtype)), mask=images.mask)

    def encode_captions(self, captions: Captions) -> Encoded:
        return Encoded(parts=self.read(captions.tokens), mask=captions.mask)

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(len(images)), torch.arange(len(captions)), indexing="ij")
        return self.pairs(images[rows.flatten()], captions[columns.flatten()]).scores.view(rows.shape)

    def pairs(self, images: Encoded, captions: Encoded, relations_of: Tensor | None = None) -> Pairs:
        hidden, mask = joint_sequence(images, captions)
        products = None
        for block in self.blocks:
            hidden, products = block(hidden, mask, relations_of if block is self.blocks[-1] else None)
        scores = self.verdict(hidden[:, 0]).squeeze(-1)
        if relations_of is None or products is None:
            return Pairs(scores)
        masks = parts_of(captions)[1][relations_of], parts_of(images)[1][relations_of]
        return Pairs(scores, relation_blocks(products, masks, masks[0].shape[1]))
