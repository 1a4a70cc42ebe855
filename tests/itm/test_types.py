"""Rows share their first axis through slicing, stacking and padding; gathering alone is the identity."""

from __future__ import annotations

import torch

from itm.distributed import gather_ragged_rows, gather_rows, rank, world_size
from itm.types import Batch, Captions, Encoded, Images, positives_from_ids


def test_stacking_pads_ragged_parts_with_masked_zeros():
    short = Encoded(parts=torch.ones(1, 2, 3), mask=torch.ones(1, 2, dtype=torch.bool))
    long = Encoded(parts=torch.ones(2, 4, 3), mask=torch.ones(2, 4, dtype=torch.bool))
    both = Encoded.cat([short, long])
    assert both.parts.shape == (3, 4, 3)
    assert both.mask.sum(1).tolist() == [2, 4, 4]
    assert both.parts[0, 2:].abs().sum() == 0


def test_rows_slice_by_mask_and_keep_absent_fields_absent():
    images = Images(image_id=torch.arange(3), pixels=torch.zeros(3, 3, 2, 2, dtype=torch.uint8))
    chosen = images[torch.tensor([True, False, True])]
    assert chosen.image_id.tolist() == [0, 2]
    assert chosen.regions is None
    assert len(chosen) == 2


def test_a_batch_moves_whole():
    images = Images(image_id=torch.arange(2))
    captions = Captions(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.bool), torch.arange(2))
    assert Batch(images, captions).to("meta").captions.tokens.device.type == "meta"


def test_positives_come_from_ids_not_positions():
    positives = positives_from_ids(torch.tensor([5, 7]), torch.tensor([7, 5, 5]))
    assert positives.tolist() == [[False, True, True], [True, False, False]]


def test_gathering_at_world_size_one_is_the_identity():
    x = torch.randn(2, 3, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert gather_rows(x) is x
    assert gather_ragged_rows(x) is x
