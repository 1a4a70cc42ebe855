"""A pool of reusable uint8 arrays, each for the pixels of a whole batch.

An array is given out again when nothing but the pool refers to it. The count of references is a safe sign of that: a view, a tensor or
an Arrow buffer over the memory of an array holds a reference to the array as long as it lives, and a new reference can be made from an
existing one only. So once the pool's is the last, nobody can read or write that memory, and nobody can begin to, because the pool hands
out references under its lock. A reference in a cycle that was not collected yet only delays the reuse.
"""

from __future__ import annotations

import sys
import threading
from collections import deque

import numpy as np


def _references_of_the_pool_alone() -> int:
    """What `sys.getrefcount` says of an array that only a pool holds. Interpreters differ in what a call itself adds."""
    arrays = deque([np.empty(1, np.uint8)])
    return sys.getrefcount(arrays[0])


_ALONE = _references_of_the_pool_alone()


class Buffers:
    """The pool; any number of threads may ask it. The first use of 25 MB of new memory costs a third of decoding images into it.

    It remembers the newest `most` arrays. A consumer that keeps more than that keeps them: they are forgotten here, and new ones are
    made. A copy of the pool in another process is empty.
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
