"""The shares of a split that ranks score add up to the whole, with the same bits."""

from __future__ import annotations

import pytest
import torch

from itm.evaluation import scoring
from itm.evaluation.scoring import score_matrix, score_share
from tests.support.every_matcher import KINDS, captions_of, images_of, matcher_of


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("ranks", "block"), [(1, None), (2, None), (3, 2)])
@torch.no_grad()
def test_the_shares_are_disjoint_and_add_up_to_the_scores(name: str, ranks: int, block: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring, "TILE_CAPTIONS", 4)
    monkeypatch.setattr(scoring, "TILE_VECTORS", 4)
    monkeypatch.setattr(scoring, "OWN_TILES", (1024, 4))
    matcher = matcher_of(name)
    images, captions = matcher.encode_images(images_of(7)), matcher.encode_captions(captions_of([4, 8, 3, 6, 5, 7, 4, 3, 9, 5, 6]))
    shares = [score_share(matcher, images, captions, (rank, ranks), block=block) for rank in range(ranks)]
    whole = score_matrix(matcher, images, captions, block=block)
    taken = [share != 0 for share in shares]
    assert all(bool(one.any()) for one in taken)
    assert not any(bool((taken[a] & taken[b]).any()) for a in range(ranks) for b in range(a))
    if matcher.cuts_tiles(captions) and block is None:  # blocks of other sizes may sum in another order
        torch.testing.assert_close(sum(shares), whole, atol=1e-6, rtol=0)
    else:
        assert torch.equal(sum(shares), whole)
