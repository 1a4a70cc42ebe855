"""The nouns of image-text matching, with their shapes. Everything else in `itm` speaks these types.

B, I, T, N = rows (batch, images, captions, either)   R = regions   L = tokens   K = parts   D = width   H, W = pixels
`image_id` is an int64 dense index (position of the image in its split); string ids stay in the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Tensors that share their first axis. A missing field is None; a nested `Rows` is treated like a tensor."""

    def _present(self) -> dict[str, Any]:
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    def __len__(self) -> int:
        return len(next(iter(self._present().values())))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The chosen rows: a slice, an index tensor or a bool mask."""
        return replace(self, **{name: value[rows] for name, value in self._present().items()})

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move (or cast) every tensor, as `Tensor.to`."""
        return replace(self, **{name: value.to(*args, **kwargs) for name, value in self._present().items()})

    @classmethod
    def cat(cls, pieces: Sequence[Self]) -> Self:
        """Stack pieces along the rows. Ragged second axes (parts, tokens and their masks) are zero-padded to the longest."""
        if not pieces:
            raise ValueError(f"cannot stack zero pieces of {cls.__name__}")
        names = pieces[0]._present()
        return replace(pieces[0], **{name: _cat([getattr(p, name) for p in pieces]) for name in names})


def _cat(values: list[Any]) -> Any:
    if isinstance(values[0], Rows):
        return type(values[0]).cat(values)
    if values[0].dim() > 1 and len({v.shape[1] for v in values}) > 1:
        longest = max(v.shape[1] for v in values)
        values = [torch.cat([v, v.new_zeros(v.shape[0], longest - v.shape[1], *v.shape[2:])], 1) for v in values]
    return torch.cat(values)


@dataclass(frozen=True)
class Images(Rows):
    """Images as pixels or as precomputed regions (or both).

    image_id (B,) int64; pixels (B,3,H,W) uint8, RGB, not normalised (the image encoder normalises on its device);
    regions (B,R,Dv) float; boxes (B,R,7) float, x1 y1 x2 y2 w h w*h in [0,1]; mask (B,R) bool, True = real region.
    """

    image_id: Tensor
    pixels: Tensor | None = None
    regions: Tensor | None = None
    boxes: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Captions(Rows):
    """Token ids. tokens (B,L) int64; mask (B,L) bool, True = real token; image_id (B,) int64 = the image it describes."""

    tokens: Tensor
    mask: Tensor
    image_id: Tensor


@dataclass(frozen=True)
class SoftLabels(Rows):
    """Teacher vectors of the pairs of a batch: image (B,S1), text (B,S2), float. B x B targets are formed in the method."""

    image: Tensor | None = None
    text: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What a method trains on. Usually row k of `images` and of `captions` belong together, but ids decide."""

    images: Images
    captions: Captions
    teacher: SoftLabels | None = None

    def to(self, device: Any) -> Batch:
        teacher = None if self.teacher is None else self.teacher.to(device)
        return Batch(self.images.to(device), self.captions.to(device), teacher)


@dataclass(frozen=True)
class Encoded(Rows):
    """What an encoder gives and `score` needs.

    vector (N,D): one vector per row (dual encoders: L2-normalised; late interaction: the global mean vector);
    parts (N,K,D) with mask (N,K) bool: regions, patches or words; uni (N,U): the uni-modal head of CUSA, L2-normalised.
    """

    vector: Tensor | None = None
    parts: Tensor | None = None
    mask: Tensor | None = None
    uni: Tensor | None = None


@runtime_checkable
class Matcher(Protocol):
    """Encode, encode, score. Implementations are `nn.Module`s; larger scores mean a better match."""

    def encode_images(self, images: Images) -> Encoded: ...

    def encode_captions(self, captions: Captions) -> Encoded: ...

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T) scores, images in rows."""
        ...


def positives_from_ids(image_ids: Tensor, caption_image_ids: Tensor) -> Tensor:
    """(I,T) bool: caption t describes image i. image_ids (I,), caption_image_ids (T,), both integer."""
    return image_ids[:, None] == caption_image_ids[None, :]
