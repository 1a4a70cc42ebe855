"""Arrays for whole batches that are used again."""

from __future__ import annotations

import sys
import threading
from collections import deque

import numpy as np

_ALONE = 2
"""References to an array that only its pool holds: the pool's, and the argument of the function that counts."""


class Buffers:
    """Hands out uint8 arrays, each again once nothing refers to it any more, neither views nor tensors over its memory.

    The pages of a new array of 25 MB cost as much as a third of decoding its images into it. Any number of threads may ask. Only the
    newest `most` arrays are remembered, so a consumer that keeps what it gets is none the wiser. A copy in another process is empty.
    """

    def __init__(self, most: int = 8) -> None:
        self.arrays: deque[np.ndarray] = deque(maxlen=most)
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return Buffers, (self.arrays.maxlen,)

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """(*shape) uint8, contents arbitrary."""
        with self.lock:
            for i in range(len(self.arrays)):
                if self.arrays[i].shape == shape and sys.getrefcount(self.arrays[i]) == _ALONE:
                    return self.arrays[i]
            array = np.empty(shape, np.uint8)
            self.arrays.append(array)
            return array
