"""The two sides of an index, and what an index is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from itm.types import Encoded

Find = Literal["images", "captions"]
FIELDS = ("vector", "parts", "mask", "uni")


class Side(Protocol):
    """The encoded images, or the encoded captions, of an index."""

    @property
    def fields(self) -> frozenset[str]:
        """Which of vector, parts, mask and uni its rows have."""

    def __len__(self) -> int: ...

    def read(self, rows: slice | Tensor, only: Sequence[str] = FIELDS, brief: bool = False) -> Encoded:
        """The rows of a slice with both ends, or of an index tensor (N,) int64: float32, on the CPU.

        only: the fields that are wanted. brief: the vectors may be overwritten by the next brief read of this thread, which saves fresh
        memory: filling that takes five times as long.
        """

    def pieces(self, rows: slice) -> Iterator[Encoded]:
        """What a brief `read` gives, in pieces of which each may overwrite the one before. Vectors come in pieces that fit into the cache
        of a core: converted and compared there, they cost little more than a product of float32 in memory.
        """


class Held:
    """A side that lies in memory."""

    def __init__(self, encoded: Encoded) -> None:
        self.encoded = encoded
        own = encoded.each[0] if encoded.each else encoded
        self.fields = frozenset(own.present())

    def __len__(self) -> int:
        return len(self.encoded)

    def read(self, rows: slice | Tensor, only: Sequence[str] = FIELDS, brief: bool = False) -> Encoded:
        return self.encoded[rows]

    def pieces(self, rows: slice) -> Iterator[Encoded]:
        yield self.encoded[rows]


@dataclass(frozen=True)
class Identity:
    """What an index was made from. matcher: 12 hex digits of weights and preparation; data: fingerprint of each split, by its URI."""

    matcher: str
    data: Mapping[str, str]
