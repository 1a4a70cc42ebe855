"""Tensors that share their first axis: what images, captions, encodings and soft labels have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Tensors that share their first axis. A missing field is None.

    Rows on a GPU remember those in main memory that they were moved from: what must be known of them, such as lengths, is read from
    `host`, and the host does not wait for the device.
    """

    each: tuple[Self, ...] = field(default=(), kw_only=True, repr=False)
    """Of a mean of matchers: the same rows as each member has them; empty for all others."""

    @property
    def host(self) -> Self:
        """The same rows in main memory, without large fields; what was not moved from there is copied, which waits."""
        twin: Self | None = self.__dict__.get("_host")
        return self.light().to("cpu") if twin is None else twin

    def light(self) -> Self:
        """Without fields that a device should rather hold alone."""
        return self

    def moved_from(self, here: Self) -> Self:
        """The same rows, which lie elsewhere, with `here` as what is known of them in main memory."""
        if here.host_known and not self.host_known:
            object.__setattr__(self, "_host", here.host)
        return self

    @property
    def host_known(self) -> bool:
        """Whether `host` costs nothing."""
        here = all(value.device.type == "cpu" for value in self.present().values())
        return "_host" in self.__dict__ or (here and all(rows.host_known for rows in self.each))

    def present(self) -> dict[str, Tensor]:
        """The tensors that are set, by name."""
        return {f.name: v for f in fields(self) if f.name != "each" and (v := getattr(self, f.name)) is not None}

    def __len__(self) -> int:
        return len(next(iter(self.present().values()), next(iter(self.each), ())))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The chosen rows: a slice, an index tensor or a bool mask."""
        each = tuple(own[rows] for own in self.each)
        chosen = replace(self, each=each, **{name: value[rows] for name, value in self.present().items()})
        known = "_host" in self.__dict__ and (isinstance(rows, slice) or rows.device.type == "cpu")
        return chosen.moved_from(self.host[rows]) if known else chosen

    def to(self, target: torch.device | torch.dtype | str, non_blocking: bool = False) -> Self:
        """Move (or cast) every tensor, as `Tensor.to`."""
        each = tuple(own.to(target, non_blocking) for own in self.each)
        moved = replace(self, each=each, **{name: value.to(target, non_blocking=non_blocking) for name, value in self.present().items()})
        return moved.moved_from(self)

    @classmethod
    def cat(cls, pieces: Sequence[Self]) -> Self:
        """Stack pieces along the rows. Ragged second axes (parts, tokens and their masks) are zero-padded to the longest."""
        if not pieces:
            raise ValueError(f"cannot stack zero pieces of {cls.__name__}")
        names = pieces[0].present()
        each = tuple(cls.cat(own) for own in zip(*(p.each for p in pieces), strict=True))
        return replace(pieces[0], each=each, **{name: _cat([p.present()[name] for p in pieces]) for name in names})


def _cat(values: list[Tensor]) -> Tensor:
    if values[0].dim() > 1 and len({v.shape[1] for v in values}) > 1:
        longest = max(v.shape[1] for v in values)
        values = [torch.cat([v, v.new_zeros(v.shape[0], longest - v.shape[1], *v.shape[2:])], 1) for v in values]
    return torch.cat(values)
