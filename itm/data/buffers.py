"""Arrays for whole batches that are used again."""

from __future__ import annotations

import sys
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

_ALONE = 2
"""References to an array that only its pool holds: the pool's, and the argument of the function that counts."""


class Event(Protocol):
    """As torch.cuda.Event: whether what was asked of the device before it is done."""

    def query(self) -> bool: ...


@dataclass
class _Kept:
    array: np.ndarray
    event: Event | None = None


class Buffers:
    """Hands out uint8 arrays, each again once nothing refers to it any more, neither views nor tensors over its memory.

    The pages of a new array of 25 MB cost as much as a third of decoding its images into it. Any number of threads may ask. Only the
    newest `most` arrays are remembered, so a consumer that keeps what it gets is none the wiser. A copy in another process is empty.
    pinned: in page-locked memory, from which a GPU copies by itself; `hold` keeps an array until such a copy has ended.
    """

    def __init__(self, most: int = 8, pinned: bool = False) -> None:
        self.kept: deque[_Kept] = deque(maxlen=most)
        self.pinned = pinned
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Buffers, (self.kept.maxlen, self.pinned)

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """(*shape) uint8, contents arbitrary."""
        with self.lock:
            for kept in self.kept:
                if kept.array.shape == shape and sys.getrefcount(kept.array) == _ALONE and (kept.event is None or kept.event.query()):
                    kept.event = None
                    return kept.array
            array = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy() if self.pinned else np.empty(shape, np.uint8)
            self.kept.append(_Kept(array))
            return array

    def hold(self, array: np.ndarray, event: Event) -> None:
        """Hand `array`, which came from here, out again only when `event` is done, whatever refers to it."""
        with self.lock:
            for kept in self.kept:
                if kept.array is array:
                    kept.event = event
