import numpy as np
import pytest
import torch

from itm.evaluation.scoring import score_matrix, scoring_mode, trim
from itm.types import Encoded
from tests.support import oracles
from tests.support.word_matcher import Words, world


@pytest.mark.parametrize("block", [None, 1, 3, 100])
def test_tiles_of_any_size_give_the_scores_of_single_pairs_in_the_order_of_the_input(block):
    matcher, (images, captions) = Words(), world()
    want = oracles.pairwise_scores(matcher, images, captions)
    np.testing.assert_allclose(score_matrix(matcher, images, captions, block=block, batch_size=5).numpy(), want, rtol=1e-5, atol=1e-6)


def test_encoded_input_gives_the_same_scores_as_raw_input():
    matcher, (images, captions) = Words(), world()
    with torch.inference_mode():
        encoded = matcher.encode_images(images), matcher.encode_captions(captions)
    assert torch.allclose(score_matrix(matcher, *encoded), score_matrix(matcher, images, captions), atol=1e-6)


def test_captions_are_scored_by_length_and_without_the_padding_of_longer_tiles(monkeypatch):
    monkeypatch.setattr("itm.evaluation.scoring.TILE_CAPTIONS", 8)
    matcher, (images, captions) = Words(), world()
    score_matrix(matcher, images, captions)
    lengths = captions.mask.sum(1).sort().values
    assert [shape[1] for _, shape in matcher.tiles] == [int(lengths[i : i + 8].max()) for i in range(0, 33, 8)]


def test_a_smaller_memory_budget_gives_more_tiles_and_equal_scores(monkeypatch):
    matcher, (images, captions) = Words(), world()
    whole = score_matrix(matcher, images, captions)
    before = len(matcher.tiles)
    monkeypatch.setattr("itm.evaluation.scoring.TILE_BYTES", 100_000)
    assert torch.allclose(score_matrix(matcher, images, captions), whole, atol=1e-6)
    assert len(matcher.tiles) - before > before


def test_an_ensemble_is_the_mean_of_the_scores_of_its_members():
    members, (images, captions) = [Words(1), Words(2), Words(3)], world()
    want = sum(score_matrix(m, images, captions) for m in members) / 3
    assert torch.allclose(score_matrix(members, images, captions), want, atol=1e-6)


def test_an_ensemble_with_one_encoding_for_all_members_is_refused():
    images, captions = world()
    with torch.inference_mode():
        encoded = Words(1).encode_images(images)
    with pytest.raises(ValueError, match="2 matchers need one image encoding each"):
        score_matrix([Words(1), Words(2)], encoded, captions)
    with pytest.raises(ValueError, match="2 matchers, but 1 image encodings"):
        score_matrix([Words(1), Words(2)], [encoded], captions)


def test_scoring_leaves_the_matcher_in_the_mode_it_was_in():
    matcher = Words().train()
    with scoring_mode(matcher):
        assert not matcher.training
        assert not torch.is_grad_enabled()
    assert matcher.training


def test_bf16_scores_are_near_the_scores_of_record_but_not_equal():
    matcher, (images, captions) = Words(), world()
    exact, rough = (score_matrix(matcher, images, captions, precision=p) for p in ("fp32", "bf16"))
    assert rough.dtype == torch.float32
    assert 0 < float((exact - rough).abs().max()) < 0.05 * float(exact.abs().max())


def test_an_unknown_precision_and_an_empty_side_are_refused():
    images, captions = world()
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        score_matrix(Words(), images, captions, precision="fp8")
    with pytest.raises(ValueError, match="no captions to score"):
        score_matrix(Words(), images, captions[:0])


def test_trimming_keeps_every_real_part():
    mask = torch.tensor([[True, True, False, False], [True, False, True, False]])
    rows = Encoded(parts=torch.ones(2, 4, 3), mask=mask)
    assert trim(rows).parts.shape == (2, 3, 3)
    assert torch.equal(trim(rows).mask, mask[:, :3])
