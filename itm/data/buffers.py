"""A pool of reusable uint8 arrays, each for the pixels of a whole batch.

An array is given out again when nothing but the pool refers to it. The count of references is a safe sign of that: a view, a tensor or
an Arrow buffer over the memory of an array holds a reference to the array as long as it lives, and a new reference can be made from an
existing one only. So once the pool's is the last, nobody can read or write that memory, and nobody can begin to, because the pool hands
out references under its lock. A reference in a cycle that was not collected yet only delays the reuse. A GPU that copies out of an array
holds no reference: `hold` keeps the array until the event of that copy is done.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from typing import Protocol

import numpy as np
import torch


def _references_of_the_pool_alone() -> int:
    """What `sys.getrefcount` says of an array that only a pool holds. Interpreters differ in what a call itself adds."""
    arrays = deque([np.empty(1, np.uint8)])
    return sys.getrefcount(arrays[0])


_ALONE = _references_of_the_pool_alone()


class Event(Protocol):
    """As torch.cuda.Event: whether what was asked of the device before it is done."""

    def query(self) -> bool: ...


class Buffers:
    """The pool; any number of threads may ask it. The first use of 25 MB of new memory costs a third of decoding images into it.

    It remembers the newest `most` arrays. A consumer that keeps more than that keeps them: they are forgotten here, and new ones are
    made. A copy of the pool in another process is empty. pinned: in page-locked memory, out of which a GPU copies by itself.
    """

    def __init__(self, most: int = 8, pinned: bool = False) -> None:
        self.arrays: deque[np.ndarray] = deque(maxlen=most)
        self.copies: dict[int, Event] = {}  # of the arrays that a device may be reading, by id
        self.pinned = pinned
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return Buffers, (self.arrays.maxlen, self.pinned)

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """(*shape) uint8, contents arbitrary."""
        with self.lock:
            for i in range(len(self.arrays)):
                if self.arrays[i].shape == shape and sys.getrefcount(self.arrays[i]) == _ALONE and self._copied(id(self.arrays[i])):
                    return self.arrays[i]
            array = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy() if self.pinned else np.empty(shape, np.uint8)
            if len(self.arrays) == self.arrays.maxlen:
                self.copies.pop(id(self.arrays[0]), None)
            self.arrays.append(array)
            return array

    def hold(self, array: np.ndarray, event: Event) -> None:
        """Give `array`, which came from here, out again only when `event` is done, whatever refers to it."""
        with self.lock:
            self.copies[id(array)] = event

    def _copied(self, array: int) -> bool:
        if array in self.copies and not self.copies[array].query():
            return False
        self.copies.pop(array, None)
        return True
