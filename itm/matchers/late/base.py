"""What the late-interaction matchers share: norms as SCAN defines them, cosines with attended vectors that are never built, towers.

Symbols: I images, T captions, R regions, L words, D width; Q queries and C context items stand for either side.
"""

from __future__ import annotations

from typing import ClassVar, TypedDict

import torch
from torch import Tensor, nn

from itm.matchers.encoders.build import Encoder, build_image_encoder, build_text_encoder, options_of
from itm.matchers.norms import full, guarded_root, l2, masked_mean, xavier
from itm.matchers.relations import COSINE_SMOOTHING, cosine_relations
from itm.types import Captions, Encoded, Images, Matcher, Options, Relations


def gram(context: Tensor) -> Tensor:
    """(N,C,D) -> (N,C,C) inner products of the context items of a row."""
    with torch.autocast(context.device.type, enabled=False):
        return full(context) @ full(context).transpose(1, 2)


def raw_scores(query: Tensor, context: Tensor) -> Tensor:
    """Inner products of every query item with every context item: (Nq,Q,D), (Nc,C,D) -> (Nc,Nq,Q,C), at least float32."""
    (rows, items, _), (others, parts, _) = query.shape, context.shape
    return full(query.flatten(0, 1) @ context.flatten(0, 1).T).view(rows, items, others, parts).permute(2, 0, 1, 3)


def attended_norm(weights: Tensor, grams: Tensor) -> Tensor:
    """||sum_c w_c context_c|| = sqrt(w' G w) without building the vector (docs/methods/scan.md#exact-shortcuts).

    weights (Nc,Nq,Q,C), grams (Nc,C,C) -> (Nc,Nq,Q). Exact up to rounding; the square is clamped at 0.
    """
    flat = weights.flatten(1, 2)
    with torch.autocast(weights.device.type, enabled=False):
        return guarded_root((flat @ grams * flat).sum(-1)).view(weights.shape[:3])


def zero_padding(query: Tensor, query_mask: Tensor) -> Tensor:
    """Zero the padded items, so that they add nothing to a norm over the query axis."""
    return query.masked_fill(~query_mask.unsqueeze(-1), 0.0)


def parts_of(encoded: Encoded) -> tuple[Tensor, Tensor]:
    """(parts, mask) of an `Encoded` that must have both."""
    assert encoded.parts is not None, "late interaction needs parts"
    assert encoded.mask is not None, "late interaction needs a mask"
    return encoded.parts, encoded.mask


class UnitProjection(nn.Module):
    """Linear layer (Xavier-uniform, zero bias) where widths differ, then `l2`: foreign parts become unit vectors of the common width."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.linear = nn.Identity() if inside == outside else xavier(inside, outside)

    def forward(self, parts: Tensor) -> Tensor:
        return l2(self.linear(parts))


class Towers(TypedDict, total=False):
    """Options that every late-interaction matcher takes: an encoder of either side, by kind and options."""

    image: Options | None
    text: Options | None


class LateInteraction(Matcher):
    """Towers of a matcher that scores parts against parts: any image encoder, any text encoder, brought to the text side's width.

    `image` and `text` name an encoder and its options: {"kind": "regions", "in_width": 2048} (default), {"kind": "hf_vision", ...};
    {"kind": "gru"} (default), {"kind": "hf_text", ...}.
    Encoded: parts (N,K,D), padding exactly zero; mask (N,K); vector (N,D) = mean of the parts.
    """

    image_kind: ClassVar[str | None] = "regions"
    gru_dropout: float = 0.0

    def __init__(self, *, vocab_size: int, image: Options | None, text: Options | None) -> None:
        """Raises ValueError for an unknown encoder or option, or an encoder without parts."""
        super().__init__()
        text = {"kind": "gru", **(text or {})}
        if text["kind"] == "gru":
            text = {"dropout": self.gru_dropout, **text}
        self.text = build_text_encoder(vocab_size=vocab_size, **text)
        self.width = int(self.text.width)
        image = {"kind": self.image_kind, **(image or {})}
        if image["kind"] == "regions":
            image = {"width": self.width, **image}
        self.image = build_image_encoder(**image)
        self.vector_width = self.width
        self.image_parts = _to_unit(self.image, self.width, image["kind"])
        self.text_parts = _to_unit(self.text, self.width, text["kind"])
        self.towers: Options = {
            "image": {"kind": image["kind"], **options_of(self.image, image)},
            "text": {"kind": text["kind"], **options_of(self.text, text)},
        }

    def layers(self) -> list[nn.Module]:
        return [self.text, self.image]

    def encoders(self) -> dict[str, nn.Module]:
        return {"image": self.image, "text": self.text}

    def encode_images(self, images: Images) -> Encoded:
        return _finish(self.image(images), self.image_parts, images, "image", "region")

    def encode_captions(self, captions: Captions) -> Encoded:
        return _finish(self.text(captions), self.text_parts, captions, "caption", "word")

    def check_relations(self) -> None:
        pass

    def relations(self, images: Images, captions: Captions) -> tuple[Encoded, Encoded, Relations]:
        """The blocks are cosines of the parts (`cosine_relations`)."""
        left, right = self.encode_images(images), self.encode_captions(captions)
        return left, right, cosine_relations(left, right, self.relation_smoothing)

    def attention(self, images: Encoded, captions: Encoded) -> Tensor | None:
        """(N,L,R) of row-aligned pairs; where regions ask, the same weights turned, so that those of a region sum to 1."""
        return torch.cat([self.weights(images[k : k + 1], captions[k : k + 1]) for k in range(len(images))])

    def weights(self, image: Encoded, caption: Encoded) -> Tensor:
        """(1,L,R) of one pair."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its words and regions attend to each other")

    @property
    def relation_smoothing(self) -> float:
        """What multiplies the cosines of parts before their softmax, in `relations`."""
        return COSINE_SMOOTHING


def _to_unit(encoder: Encoder, width: int, kind: str) -> nn.Module:
    """Encoders of the SCAN family normalise as their own options say; the parts of all others become unit vectors here."""
    if not encoder.width:
        raise ValueError(f"encoder {kind!r} gives no parts (regions, patches or words); late interaction needs them")
    return nn.Identity() if encoder.unit_parts and encoder.width == width else UnitProjection(encoder.width, width)


def _finish(encoded: Encoded, to_unit: nn.Module, rows: Images | Captions, what: str, part: str) -> Encoded:
    parts, mask = encoded.parts, encoded.mask
    assert parts is not None
    if mask is None:
        mask = parts.new_ones(parts.shape[:2], dtype=torch.bool)
    known = rows.host.mask if mask is rows.mask else mask  # encoders of words and regions hand the mask of their rows on
    assert known is not None
    empty = (~known.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{what} rows {empty[:8]} of the batch have no {part} at all: drop them when packing, or give them one")
    parts = to_unit(parts).masked_fill(~mask.unsqueeze(-1), 0.0)
    return Encoded(vector=masked_mean(parts, mask), parts=parts, mask=mask)
