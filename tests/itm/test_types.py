"""Rows share their first axis through slicing, stacking and padding; gathering alone is the identity."""

from __future__ import annotations

import pytest
import torch

from itm.config import Part
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import WordVocabulary
from itm.distributed import gather_ragged_rows, gather_rows, rank, world_size
from itm.matchers.folder import build_matcher
from itm.types import Batch, Captions, Encoded, Images, Matcher, positives_from_ids


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


def test_a_matcher_without_abilities_has_defaults_and_says_what_it_lacks():
    class Bare(Matcher):
        kind = "bare"

    bare, one = Bare(), Encoded(vector=torch.ones(1, 2))
    assert (bare.joint, bare.prunes, bare.recompute, bare.fuse_tiles, bare.layers(), bare.cuts_tiles(one)) == (False,) * 4 + ([], False)
    assert bare.training_terms(torch.zeros(1, 1), torch.ones(1, 1).bool(), 1) == {}
    assert bare.attention(one, one) is None
    for ask, message in (
        (lambda: bare.score(one, one), "Bare does not say how it scores"),
        (lambda: bare.pairs(one, one), "Bare has no joint encoder"),
        (lambda: bare.check_relations(), "Bare offers one vector a side"),
        (lambda: bare.inputs, "made without inputs"),
    ):
        with pytest.raises((NotImplementedError, ValueError), match=message):
            ask()


def test_the_inputs_of_a_matcher_follow_its_weights_and_leave_those_they_were_made_of():
    inputs = Inputs(ImageInput(size=8), WordVocabulary.from_captions(["a red square"]))
    matcher = build_matcher(Part(kind="dual", options={"width": 4}), inputs)
    assert matcher.inputs.captions(["a square"]).tokens.device.type == "cpu"
    around = torch.nn.ModuleDict({"matcher": matcher}).to("meta")
    assert around["matcher"].inputs.captions(["a square"]).tokens.device.type == "meta"
    assert inputs.captions(["a square"]).tokens.device.type == "cpu"
