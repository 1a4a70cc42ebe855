"""What the late-interaction matchers share: norms as SCAN defines them, cosines with attended vectors that are never built, towers.

Symbols: I images, T captions, R regions, L words, D width; Q queries and C context items stand for either side.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from itm.matchers.encoders.build import build_image_encoder, build_text_encoder
from itm.matchers.norms import full, guarded_root, l2, masked_mean, xavier
from itm.types import Captions, Encoded, Images


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


class LateInteraction(nn.Module):
    """Towers of a matcher that scores parts against parts: any image encoder, any text encoder, brought to the text side's width.

    `image` and `text` name an encoder and its options: {"kind": "regions", "in_width": 2048} (default), {"kind": "hf_vision", ...};
    {"kind": "gru"} (default), {"kind": "hf_text", ...}.
    Encoded: parts (N,K,D), padding exactly zero; mask (N,K); vector (N,D) = mean of the parts.
    """

    image_kind: ClassVar[str] = "regions"
    gru_dropout: float = 0.0

    def __init__(self, *, vocab_size: int, image: dict[str, Any] | None, text: dict[str, Any] | None) -> None:
        """Raises ValueError for an unknown encoder or option, or an encoder without parts."""
        super().__init__()
        text = {"kind": "gru", **(text or {})}
        if text["kind"] == "gru":
            text = {"dropout": self.gru_dropout, **text}
        words: Any = build_text_encoder(vocab_size=vocab_size, **text)
        self.text, self.width = words, int(words.width)
        image = {"kind": self.image_kind, **(image or {})}
        if image["kind"] == "regions":
            image = {"width": self.width, **image}
        self.image = build_image_encoder(**image)
        self.vector_width = self.width
        self.image_parts = _to_unit(self.image, self.width, image["kind"])
        self.text_parts = _to_unit(self.text, self.width, text["kind"])
        self.towers = {"image": _rebuilt(self.image, image), "text": _rebuilt(self.text, text)}

    def encode_images(self, images: Images) -> Encoded:
        return _finish(self.image(images), self.image_parts, "image", "region")

    def encode_captions(self, captions: Captions) -> Encoded:
        return _finish(self.text(captions), self.text_parts, "caption", "word")


def _to_unit(encoder: Any, width: int, kind: str) -> nn.Module:
    """Encoders of the SCAN family normalise as their own options say; the parts of all others become unit vectors here."""
    if not encoder.width:
        raise ValueError(f"encoder {kind!r} gives no parts (regions, patches or words); late interaction needs them")
    return nn.Identity() if getattr(encoder, "scan_family", False) and encoder.width == width else UnitProjection(encoder.width, width)


def _rebuilt(encoder: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Kind and options that rebuild the encoder without a network: it knows its configuration if it came from a path."""
    options = getattr(encoder, "options", given)
    return {"kind": given["kind"], **{k: v for k, v in options.items() if k != "kind"}}


def _finish(encoded: Encoded, to_unit: nn.Module, what: str, part: str) -> Encoded:
    parts, mask = encoded.parts, encoded.mask
    assert parts is not None
    if mask is None:
        mask = parts.new_ones(parts.shape[:2], dtype=torch.bool)
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{what} rows {empty[:8]} of the batch have no {part} at all: drop them when packing, or give them one")
    parts = to_unit(parts).masked_fill(~mask.unsqueeze(-1), 0.0)
    return Encoded(vector=masked_mean(parts, mask), parts=parts, mask=mask)
