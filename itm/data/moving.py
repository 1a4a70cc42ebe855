"""Batches on their way to a GPU: one packed copy a batch, out of page-locked memory, on a stream of its own.

The host never waits for a copy: that of a batch runs while the step before computes. The host is at most one batch ahead of the device,
which bounds the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itm.data.buffers import Buffers
from itm.types import Batch

ALIGNED = 64
"""Bytes at which every tensor of a packed batch begins: any type may be read there."""
STAGED = 3
PAGE = 1 << 20
"""Staging arrays are a multiple of it, so that batches of somewhat other captions share them."""


class Mover:
    """`mover(batch) -> Batch` on `device`; elsewhere than on a GPU, as `Batch.to`.

    The batch that was moved before has been used by then: all that was asked of the device so far is taken to read it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.copies, self.staged = torch.cuda.Stream(device), Buffers(STAGED, pinned=True)
        self.used: list[Any] = []  # an event behind each of the newest two batches

    def __call__(self, batch: Batch) -> Batch:
        tensors, rebuild = parts_of(batch)
        if self.device.type != "cuda" or all(x.is_cuda for x in tensors):
            return batch.to(self.device)
        self._wait_for_the_last_but_one()
        starts, size = places(tensors)
        there = self._copied(tensors, starts, size)
        return rebuild([_seen(there, x, start) for x, start in zip(tensors, starts, strict=True)])

    def _wait_for_the_last_but_one(self) -> None:
        """Else the host could run many steps ahead, each with a batch of its own in the memory of the device."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self.used.append(event)
        if len(self.used) > 2 and not (before := self.used.pop(0)).query():
            before.synchronize()

    def _copied(self, tensors: list[Tensor], starts: list[int], size: int) -> Tensor:
        """(size,) uint8 on the device, which the stream of the computation may read."""
        array = self.staged.empty((-(-size // PAGE) * PAGE,))
        host = torch.from_numpy(array)[:size]
        for x, start in zip(tensors, starts, strict=True):
            _seen(host, x, start).copy_(x)
        with torch.cuda.stream(self.copies):
            there = host.to(self.device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self.copies)
        self.staged.hold(array, copied)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(copied)
        there.record_stream(computing)
        return there


def _seen(packed: Tensor, like: Tensor, start: int) -> Tensor:
    """The tensor that lies at `start` of the packed bytes, with the shape, type and order of memory of `like`."""
    order = dense_order(like)
    dense = packed[start : start + like.numel() * like.element_size()].view(like.dtype).view([like.shape[k] for k in order])
    return dense.permute([order.index(k) for k in range(like.dim())])


def parts_of(batch: Batch) -> tuple[list[Tensor], Callable[[list[Tensor]], Batch]]:
    """The tensors of a batch, and what makes a batch of others in their place."""
    sides = {name: rows for name in ("images", "captions", "teacher") if (rows := getattr(batch, name)) is not None}
    names = [(side, field) for side, rows in sides.items() for field in vars(rows) if isinstance(getattr(rows, field), Tensor)]

    def rebuild(tensors: list[Tensor]) -> Batch:
        found: dict[str, dict[str, Tensor]] = {}
        for (side, field), x in zip(names, tensors, strict=True):
            found.setdefault(side, {})[field] = x
        return replace(batch, **{side: replace(rows, **found.get(side, {})) for side, rows in sides.items()})

    return [getattr(getattr(batch, side), field) for side, field in names], rebuild


def dense_order(x: Tensor) -> list[int]:
    """The axes of a tensor from the slowest in memory to the fastest: pixels stay channels last on their way."""
    return sorted(range(x.dim()), key=lambda k: (-x.stride()[k], k))


def places(tensors: list[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins, in bytes, and how many there are in all."""
    sizes = [-(-x.numel() * x.element_size() // ALIGNED) * ALIGNED for x in tensors]
    ends = np.cumsum(sizes).tolist()
    return [end - size for end, size in zip(ends, sizes, strict=True)], ends[-1]
