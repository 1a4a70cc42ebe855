"""Uni-modal heads of a matcher that has none of its own: what CUSA's USA trains beside it, saved and served with it.

A head reads the matcher's global vector (`Matcher.whole`), else its vector, else the mean of its parts
(docs/methods/cusa.md#other-base-models).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from itm.matchers.dual import Head
from itm.matchers.norms import full, masked_mean
from itm.types import Encoded, Matcher, Options

HeadKind = Literal["linear", "norm_linear", "none"]


class UniHeads(nn.ModuleDict):
    """One head of each side: `linear`, `norm_linear` (Linear after LayerNorm), or `none`, the vector that a head would read."""

    def __init__(self, kind: HeadKind = "linear", width: int = 0) -> None:
        """width: of the vectors that are read; `none` needs no width. Raises ValueError for another kind."""
        makers = {"linear": lambda: nn.Linear(width, width), "norm_linear": lambda: Head(width), "none": nn.Identity}
        if kind not in makers:
            raise ValueError(f"uni heads are linear, norm_linear or none, not {kind!r}")
        super().__init__({"image": makers[kind](), "text": makers[kind]()})
        self.kind, self.width = kind, width

    @property
    def options(self) -> Options:
        """What config.json says of them."""
        return {"kind": self.kind, "width": self.width}

    def raw(self, matcher: Matcher, encoded: Encoded, side: str) -> Tensor:
        """(N,U) of one side, image or text, not normalised."""
        return self[side](read_vector(matcher, encoded, side))

    def forward(self, matcher: Matcher, encoded: Encoded, side: str) -> Tensor:
        """(N,U) unit rows: what `Encoded.uni` holds."""
        return F.normalize(full(self.raw(matcher, encoded, side)), dim=-1)


def read_vector(matcher: Matcher, encoded: Encoded, side: str) -> Tensor:
    """(N,D) what a head reads of the encoding of a side."""
    whole = matcher.whole(encoded, side)
    vector = encoded.vector if whole is None else whole
    if vector is not None:
        return vector
    assert encoded.parts is not None
    return masked_mean(encoded.parts, encoded.mask)


def give_heads(matcher: Matcher, heads: UniHeads | None) -> None:
    """Attach heads to a matcher, or take off those that are attached (None)."""
    if heads is not None:
        matcher.uni_heads, matcher.uni_width = heads, heads.width or matcher.vector_width
    elif heads_of(matcher):  # a width that is there without them is that of the matcher's own
        matcher.uni_heads, matcher.uni_width = None, 0


def heads_of(matcher: Matcher) -> UniHeads | None:
    """The heads that are attached."""
    return matcher.uni_heads if isinstance(matcher.uni_heads, UniHeads) else None


@contextmanager
def with_heads(matcher: Matcher, heads: UniHeads | None) -> Iterator[Matcher]:
    """The matcher with the heads attached for a while."""
    if heads is None:
        yield matcher
        return
    give_heads(matcher, heads)
    try:
        yield matcher
    finally:
        give_heads(matcher, None)
