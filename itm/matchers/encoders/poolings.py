"""Poolings by kind: the parts of an image or caption -> one vector. A new pooling costs one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from itm.kinds import Kinds, build_part
from itm.matchers.norms import masked_mean
from itm.types import Options


class Pooling(nn.Module):
    """What every pooling is. Called with parts (N,K,D) and mask (N,K) bool, True = real, it gives (N,D); padding must not count."""

    def __init__(self) -> None:
        super().__init__()  # no options, where a pooling names none

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say how it pools")


class Mean(Pooling):
    """The mean of the real parts."""

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(parts, mask)


POOLINGS: Kinds[Pooling] = Kinds(
    "itm.matchers.encoders.poolings:Pooling",
    {
        "mean": "itm.matchers.encoders.poolings:Mean",
        "gpo": "itm.matchers.encoders.gpo:GPO",
    },
)


def build_pooling(kind: str, **options: Any) -> Pooling:
    """Raises ValueError for an unknown kind or option."""
    return build_part(POOLINGS, kind, options, "pooling")


def read_poolings(given: Mapping[str, Options] | None) -> dict[str, Options]:
    """{"image": {"kind": ...}, "text": {"kind": ...}} or a part of it. Raises ValueError for another side or a side without a kind."""
    found = {side: dict(part) for side, part in (given or {}).items()}
    if wrong := set(found) - {"image", "text"}:
        raise ValueError(f"pooling takes the sides image and text, not {', '.join(sorted(wrong))}")
    for side, part in found.items():
        if "kind" not in part:
            raise ValueError(f"pooling.{side} needs a kind: {', '.join(POOLINGS)}, or package.module:Name")
    return found
