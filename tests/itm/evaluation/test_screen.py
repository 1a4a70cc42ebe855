"""Screened retrieval on real small matchers: all candidates = exact, fewer candidates lose what the report says, k keeps a wanted bound."""

import math
from typing import Any

import pytest
import torch

from itm.evaluation.metrics import KS, rank_queries, retrieval_metrics
from itm.evaluation.scoring import score_matrix
from itm.evaluation.screen import Probe, ScreenedScores, by_cosine, choose_k, probe, propose, screened_scores, unit_vectors, wilson
from itm.matchers.late.scan import SCAN
from itm.matchers.late.sgraf import SGR
from itm.types import Encoded
from tests.support.late_worlds import SMALL, captions_of, images_of

OWNERS = torch.arange(40) // 2


@torch.no_grad()
def world(kind: Any = SCAN, **options: Any) -> tuple[Any, list[tuple[Encoded, Encoded]]]:
    """20 images, 40 captions; the parts of captions lean towards those of their image, so that vectors and scores agree somewhat."""
    matcher = kind(**SMALL, **options).eval()
    images = matcher.encode_images(images_of(20, 5))
    captions = matcher.encode_captions(captions_of([2 + n % 4 for n in range(40)]))
    leaning = captions.parts + images.parts[OWNERS].mean(1, keepdim=True)
    parts = torch.nn.functional.normalize(leaning, dim=-1) * captions.mask[..., None]
    vector = parts.sum(1) / captions.mask.sum(1, keepdim=True)
    return matcher, [(images, Encoded(vector, parts, captions.mask))]


def truth() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(20), OWNERS


@pytest.mark.parametrize(("kind", "options"), [(SCAN, {}), (SCAN, {"cross_attn": "i2t"}), (SGR, {"sim_dim": 8, "regions": 5})])
def test_all_candidates_give_the_exact_scores_and_metrics(kind, options):
    matcher, sides = world(kind, **options)
    screened = screened_scores([matcher], sides, 40, unit_vectors(*sides[0]))
    exact = score_matrix(matcher, *sides[0])
    torch.testing.assert_close(screened[:].float(), exact, atol=1e-6, rtol=0)
    assert retrieval_metrics(screened, truth()) == retrieval_metrics(exact, truth())


def test_each_side_has_its_k_best_proposed_and_nothing_else_is_scored():
    _, sides = world()
    vectors = unit_vectors(*sides[0])
    rows, columns = propose(vectors, 3)
    cosine = vectors[0] @ vectors[1].T
    want = torch.zeros(20, 40, dtype=torch.bool)
    want[torch.arange(20)[:, None], cosine.argsort(1, descending=True)[:, :3]] = True
    want[cosine.argsort(0, descending=True)[:3], torch.arange(40)[None]] = True
    assert torch.equal(torch.stack([rows, columns], 1), want.nonzero())


def test_scored_pairs_keep_their_score_and_stand_above_all_others_which_keep_the_order_of_their_cosines():
    matcher, sides = world()
    vectors = unit_vectors(*sides[0])
    screened = screened_scores([matcher], sides, 4, vectors)
    rows, columns = screened.pairs
    dense, exact, cosine = screened[:], score_matrix(matcher, *sides[0]).double(), vectors[0] @ vectors[1].T
    scored = torch.zeros(20, 40, dtype=torch.bool)
    scored[rows, columns] = True
    torch.testing.assert_close(dense[scored], exact[scored], atol=1e-6, rtol=0)
    assert dense[~scored].max() < dense[scored].min()
    assert torch.equal(dense[~scored].argsort(), cosine[~scored].argsort())
    torch.testing.assert_close(screened.T[torch.tensor([7, 3])], dense.T[[7, 3]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_streamed_ranks_are_those_of_the_dense_rows(k, monkeypatch):
    monkeypatch.setattr("itm.evaluation.screen.BLOCK_SCORES", 130)
    matcher, sides = world()
    screened = screened_scores([matcher, matcher], [*sides, *sides], k, unit_vectors(*sides[0]))
    absent = torch.arange(20) % 3
    got, want = rank_queries(screened, truth(), "pessimistic", absent), rank_queries(screened[:], truth(), "pessimistic", absent)
    assert torch.equal(got.best, want.best) and torch.equal(got.average_precision, want.average_precision)
    assert retrieval_metrics(screened, truth()) == retrieval_metrics(screened[:], truth())


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_probed_on_all_queries_the_loss_bounds_what_the_recalls_lose(k):
    matcher, sides = world()
    vectors = unit_vectors(*sides[0])
    screened, exact = (
        retrieval_metrics(s, truth()) for s in (screened_scores([matcher], sides, k, vectors), score_matrix(matcher, *sides[0]))
    )
    for p in probe([matcher], sides, by_cosine(vectors), (OWNERS, 100, 0)):
        assert p.whole
        for at in KS:
            lost, low, high = p.loss(k)[at]
            assert low == lost == high
            assert exact[f"{p.way}_r{at}"] == pytest.approx(p.report(k)[f"r{at}"]["exact"])
            assert exact[f"{p.way}_r{at}"] - screened[f"{p.way}_r{at}"] <= 100 * lost + 1e-9


def test_the_chosen_k_is_the_least_that_keeps_the_bound_and_some_k_loses_more():
    matcher, sides = world()
    probes = probe([matcher], sides, by_cosine(unit_vectors(*sides[0])), (OWNERS, 100, 0))
    worst = lambda k: max(high for p in probes for _, _, high in p.loss(k).values())
    for bound in (0.0, 0.05, 0.2):
        k = choose_k(probes, bound)
        assert worst(k) <= bound
        assert k == max(KS) or worst(k - 1) > bound
    assert worst(1) > 0.2


def test_a_sample_covers_the_loss_of_all_queries_in_nearly_all_draws():
    needed = torch.where(torch.rand(4000) < 0.03, 50, 1)[:, None].expand(-1, len(KS))
    share = float((needed[:, 0] > 10).double().mean())
    draws = [Probe("i2t", needed[torch.randperm(4000)[:300]], False).loss(10)[1] for _ in range(300)]
    assert sum(low <= share <= high for _, low, high in draws) >= 0.9 * len(draws)


def test_the_wilson_interval_has_its_textbook_values():
    assert wilson(0, 100) == (pytest.approx(0.0, abs=1e-15), pytest.approx(0.036994, abs=1e-6))
    assert wilson(10, 50) == (pytest.approx(0.112438, abs=1e-6), pytest.approx(0.330371, abs=1e-6))
    assert wilson(5, 5)[1] == 1.0


def test_a_sample_too_small_for_the_bound_is_refused_with_the_size_that_would_do():
    probes = [Probe("t2i", torch.ones(100, len(KS), dtype=torch.int64), False)]
    with pytest.raises(ValueError, match="100 sampled queries cannot show a loss of at most 1.00%: sample 381"):
        choose_k(probes, 0.01)
    probes = [Probe("t2i", torch.ones(381, len(KS), dtype=torch.int64), False)]
    assert choose_k(probes, 0.01) == max(KS)


def test_what_cannot_be_screened_is_refused():
    matcher, sides = world()
    bare = Encoded(parts=sides[0][0].parts, mask=sides[0][0].mask)
    with pytest.raises(ValueError, match="gives no vectors to screen with: name a dual encoder by --screen-matcher"):
        unit_vectors(bare, sides[0][1])
    with pytest.raises(ValueError, match="image vectors are 10 wide, caption vectors 3"):
        unit_vectors(sides[0][0], Encoded(vector=torch.zeros(4, 3)))
    with pytest.raises(ValueError, match="at least 1 candidate, not 0"):
        screened_scores([matcher], sides, 0, unit_vectors(*sides[0]))
    broken = [(Encoded(sides[0][0].vector, sides[0][0].parts * math.nan, sides[0][0].mask), sides[0][1])]
    with pytest.raises(ValueError, match=r"\d+ scores are NaN, the first at image 0, caption \d+"):
        screened_scores([matcher], broken, 3, unit_vectors(*sides[0]))
    assert isinstance(screened_scores([matcher], sides, 1, unit_vectors(*sides[0])), ScreenedScores)
