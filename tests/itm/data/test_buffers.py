from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from itm.data.buffers import Buffers

HOLDERS: dict[str, Callable[[np.ndarray], Any]] = {
    "the array": lambda array: array,
    "a view": lambda array: array[1:, ::2],
    "a tensor": torch.from_numpy,
    "a view of a tensor": lambda array: torch.from_numpy(array).permute(1, 0)[:1],
    "an Arrow array": lambda array: pa.array(array.reshape(-1)),
    "a memoryview": memoryview,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_an_array_is_given_again_when_nothing_refers_to_its_memory(holder: str) -> None:
    buffers = Buffers()
    first = buffers.empty((3, 4))
    address, held = first.ctypes.data, HOLDERS[holder](first)
    del first
    assert buffers.empty((3, 4)).ctypes.data != address
    del held
    assert address in {array.ctypes.data for array in (buffers.empty((3, 4)), buffers.empty((3, 4)))}


def test_arrays_of_another_shape_are_new_ones() -> None:
    buffers = Buffers()
    assert buffers.empty((3, 4)).shape == (3, 4)
    assert buffers.empty((4, 3)).shape == (4, 3)
    assert buffers.empty((4, 3)).dtype == np.uint8


def test_what_a_consumer_keeps_is_forgotten_and_never_written_again() -> None:
    buffers, kept = Buffers(most=2), []
    for number in range(6):
        kept.append(buffers.empty((8,)))
        kept[-1][:] = number
    assert [int(array[0]) for array in kept] == list(range(6))
    assert len(buffers.arrays) == 2


def test_a_copy_in_another_process_is_empty() -> None:
    buffers = Buffers(most=3)
    buffers.empty((1000,))
    copy = pickle.loads(pickle.dumps(buffers))
    assert (copy.arrays.maxlen, list(copy.arrays)) == (3, [])


class Copy:
    """Stands in for the event of a copy to a GPU."""

    done = False

    def query(self) -> bool:
        return self.done


def test_an_array_is_not_given_again_before_the_event_of_its_copy_is_done() -> None:
    buffers, copy = Buffers(), Copy()
    array = buffers.empty((5,))
    address = array.ctypes.data
    buffers.hold(array, copy)
    del array
    other = buffers.empty((5,))
    assert other.ctypes.data != address, "nothing refers to the array, but it is still being read"
    copy.done = True
    assert buffers.empty((5,)).ctypes.data == address
    third = buffers.empty((5,))
    assert third.ctypes.data == address, "a new use begins without the old event"
