"""Dual encoder (VSE): any image encoder and any text encoder, projected to one space; a score is a cosine.

The vector of a side is the encoder's own, or a `pooling` of its projected parts (docs/methods/dual.md#generalised-pooling).
With heads (docs/methods/dual.md#heads) the retrieval vector goes through a `cross` head, and `uni` heads add vectors for image-image and
text-text similarity. The heads belong to the matcher, so they are evaluated, saved and registered with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itm.matchers.encoders.build import Encoder, build_image_encoder, build_text_encoder, options_of
from itm.matchers.encoders.poolings import Pooling, build_pooling, read_poolings
from itm.matchers.norms import masked_mean
from itm.matchers.relations import COSINE_SMOOTHING, cosine_relations
from itm.types import Captions, Encoded, Images, Matcher, Options, Relations


class Head(nn.Module):
    """Linear(LayerNorm(z)), width to width; Linear weight N(0, 0.02), LayerNorm eps 1e-5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        nn.init.normal_(self.linear.weight, std=0.02)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(self.norm(z))


Uni = bool | Literal["bare"]
"""Whether there is a uni head; bare: the feature itself takes its place, which a cross head would otherwise hide."""


class Heads(nn.Module):
    """The heads of one modality. `vector` = normalised cross head (or the normalised feature), `uni` = normalised uni head, or bare
    feature."""

    def __init__(self, width: int, cross: bool, uni: Uni) -> None:
        super().__init__()
        self.cross = Head(width) if cross else nn.Identity()
        self.uni = nn.Identity() if uni == "bare" else Head(width) if uni else None

    def forward(self, z: Tensor) -> Encoded:
        """(N,D) features -> Encoded with unit rows."""
        return Encoded(vector=F.normalize(self.cross(z), dim=-1), uni=None if self.uni is None else F.normalize(self.uni(z), dim=-1))


class HeadChoices(TypedDict):
    cross: bool
    uni: Uni


def read_heads(heads: Mapping[str, Uni] | None) -> HeadChoices:
    """Both filled in. Raises ValueError for another key or value."""
    given = {"cross": False, "uni": False, **(heads or {})}
    if set(given) != {"cross", "uni"}:
        raise ValueError(f"heads takes cross and uni (true or false), not {sorted(set(given) - {'cross', 'uni'})}")
    cross, uni = given["cross"], given["uni"]
    if not isinstance(cross, bool) or uni not in (True, False, "bare"):
        raise ValueError(f"heads takes cross (true or false) and uni (true, false or bare), not cross: {cross}, uni: {uni}")
    return {"cross": cross, "uni": uni}


class DualEncoder(Matcher):
    """Encoders, one linear layer each to `width`, optional heads, L2 normalisation. score = cosine."""

    kind: ClassVar[str] = "dual"
    image_kind: ClassVar[str | None] = "conv"

    def __init__(
        self,
        *,
        vocab_size: int,
        image: Options | None = None,
        text: Options | None = None,
        width: int = 128,
        heads: Mapping[str, Uni] | None = None,
        pooling: dict[str, Options] | None = None,
    ) -> None:
        """`image` and `text` name an encoder and its options, e.g. {"kind": "conv", "image_size": 64}; `pooling` names one a side, e.g.
        {"image": {"kind": "gpo"}}, in the place of the encoder's own vector. Raises ValueError as they do."""
        super().__init__()
        poolings = read_poolings(pooling)
        image, text, chosen = image or {"kind": self.image_kind}, text or {"kind": "pooled_gru"}, read_heads(heads)
        self.image_encoder = build_image_encoder(**image)
        self.text_encoder = build_text_encoder(vocab_size=vocab_size, **text)
        self.image_pooling = build_pooling(**poolings["image"]) if "image" in poolings else None
        self.text_pooling = build_pooling(**poolings["text"]) if "text" in poolings else None
        self.image_linear = nn.Linear(_pooled_width(self.image_encoder, self.image_pooling), width)
        self.text_linear = nn.Linear(_pooled_width(self.text_encoder, self.text_pooling), width)
        self.image_heads, self.text_heads = Heads(width, **chosen), Heads(width, **chosen)
        self.vector_width, self.uni_width = width, width if chosen["uni"] else 0
        self.options = {
            "image": {"kind": image["kind"], **options_of(self.image_encoder, image)},
            "text": {"kind": text["kind"], **options_of(self.text_encoder, text)},
            "width": width,
            "heads": chosen,
            **({"pooling": poolings} if poolings else {}),
        }

    def layers(self) -> list[nn.Module]:
        return [self.image_encoder, self.text_encoder]

    def encoders(self) -> dict[str, nn.Module]:
        return {"image": self.image_encoder, "text": self.text_encoder}

    def encode_images(self, images: Images) -> Encoded:
        return self.image_heads(_vector(self.image_encoder(images), self.image_linear, self.image_pooling))

    def encode_captions(self, captions: Captions) -> Encoded:
        return self.text_heads(_vector(self.text_encoder(captions), self.text_linear, self.text_pooling))

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T) cosines."""
        return cosines(images, captions)

    def check_relations(self) -> None:
        """Raises ValueError where the parts of an encoder are not as wide as what its linear layer takes."""
        for side, encoder, linear in (
            ("image", self.image_encoder, self.image_linear),
            ("text", self.text_encoder, self.text_linear),
        ):
            if encoder.width != linear.in_features:
                raise ValueError(
                    f"IAIS relates words and image parts in one space, but the {side} parts of this dual encoder are {encoder.width} "
                    f"wide and its projection takes {linear.in_features}: choose an encoder whose parts and vector have one width "
                    "(hf_vision, pooled_gru)"
                )

    def relations(self, images: Images, captions: Captions) -> tuple[Encoded, Encoded, Relations]:
        """The blocks are cosines of the projected parts, which an encoding no longer holds (`cosine_relations`)."""
        self.check_relations()
        left, right = self.image_encoder(images), self.text_encoder(captions)
        parts = _projected(left, self.image_linear), _projected(right, self.text_linear)
        vectors = _vector(left, self.image_linear, self.image_pooling), _vector(right, self.text_linear, self.text_pooling)
        encoded = self.image_heads(vectors[0]), self.text_heads(vectors[1])
        return *encoded, cosine_relations(*parts, COSINE_SMOOTHING)


def cosines(images: Encoded, captions: Encoded) -> Tensor:
    """(I,T) products of unit vectors, at least float32 whatever the autocast: temperatures enlarge their rounding."""
    assert images.vector is not None
    assert captions.vector is not None
    kind = torch.promote_types(images.vector.dtype, torch.float32)
    with torch.autocast(images.vector.device.type, enabled=False):
        return images.vector.to(kind) @ captions.vector.to(kind).T


def _pooled(encoded: Encoded) -> Tensor:
    """The encoder's own vector, else the mean of its real parts."""
    if encoded.vector is not None:
        return encoded.vector
    assert encoded.parts is not None, "an encoder returns a vector or parts"
    return masked_mean(encoded.parts, encoded.mask)


def _vector(encoded: Encoded, linear: nn.Linear, pooling: Pooling | None) -> Tensor:
    """(N,width). A pooling that is asked for reads the projected parts, as VSE-infinity has it."""
    if pooling is None:
        return linear(_pooled(encoded))
    assert encoded.parts is not None
    mask = encoded.mask if encoded.mask is not None else encoded.parts.new_ones(encoded.parts.shape[:2], dtype=torch.bool)
    return pooling(linear(encoded.parts), mask)


def _pooled_width(encoder: Encoder, pooling: Pooling | None) -> int:
    if pooling is not None and not encoder.width:
        raise ValueError(f"pooling needs parts, and the encoder {type(encoder).__name__} gives one vector only: leave pooling out")
    return int(encoder.width if pooling is not None else encoder.vector_width or encoder.width)


def _projected(encoded: Encoded, linear: nn.Module) -> Encoded:
    """The parts of an encoder in the common space."""
    parts = encoded.parts
    assert parts is not None
    mask = encoded.mask if encoded.mask is not None else parts.new_ones(parts.shape[:2], dtype=torch.bool)
    return Encoded(parts=linear(parts), mask=mask)
