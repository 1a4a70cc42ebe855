"""What a packed batch must keep: values, types, shapes and the order of memory of every tensor."""

from __future__ import annotations

import torch

from itm.data.moving import ALIGNED, Mover, _seen, parts_of, places
from itm.types import Batch, Captions, Images, SoftLabels


def a_batch() -> Batch:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (3, 5, 5, 3), dtype=torch.uint8).permute(0, 3, 1, 2)  # channels last
    images = Images(torch.arange(3), pixels, torch.randn(3, 2, 4), torch.rand(3, 2, 7), torch.tensor([[True, False]] * 3))
    captions = Captions(torch.randint(0, 9, (3, 7)), torch.rand(3, 7) > 0.5, torch.arange(3))
    return Batch(images, captions, SoftLabels(text=torch.randn(3, 6).half()))


def test_tensors_come_out_of_packed_bytes_as_they_went_in() -> None:
    batch = a_batch()
    tensors, rebuild = parts_of(batch)
    starts, size = places(tensors)
    assert all(start % ALIGNED == 0 for start in starts)
    packed = torch.zeros(size, dtype=torch.uint8)
    for x, start in zip(tensors, starts, strict=True):
        _seen(packed, x, start).copy_(x)
    again = rebuild([_seen(packed, x, start) for x, start in zip(tensors, starts, strict=True)])
    assert len(tensors) == 9
    for x, y in zip(tensors, parts_of(again)[0], strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride()
    assert again.teacher is not None and again.teacher.image is None


def test_on_a_cpu_a_batch_stays_where_it_is() -> None:
    batch = a_batch()
    there = Mover(torch.device("cpu"))(batch)
    assert there.images.pixels is batch.images.pixels
    assert there.captions.tokens is batch.captions.tokens
