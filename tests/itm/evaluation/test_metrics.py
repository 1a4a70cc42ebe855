import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from itm.evaluation import counting
from itm.evaluation.metrics import chance_metrics, rank_queries, retrieval_metrics
from tests.support import oracles

RULES = ["pessimistic", "optimistic", "official", "lower_index"]


@st.composite
def ragged_worlds(draw):
    """Scores on a coarse grid (many ties) and a truth in which every image and caption has a positive, some several."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images, captions = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    scores = rng.integers(0, draw(st.sampled_from([1, 3, 8, 10_000])), (images, captions)).astype(np.float32)
    truth = rng.random((images, captions)) < draw(st.floats(0, 0.6))
    truth[np.arange(images), rng.integers(0, captions, images)] = True
    truth[rng.integers(0, images, captions), np.arange(captions)] = True
    return scores, truth


@settings(max_examples=120, deadline=None)
@given(ragged_worlds(), st.sampled_from(RULES), st.sampled_from([1, 7, 64, 1 << 20]))
def test_every_metric_equals_a_loop_over_sorted_lists_for_any_truth_ties_and_block_size(world, tie, block):
    scores, truth = world
    kept, counting.BLOCK_SCORES = counting.BLOCK_SCORES, block
    try:
        got = retrieval_metrics(torch.from_numpy(scores), torch.from_numpy(truth), tie=tie)
    finally:
        counting.BLOCK_SCORES = kept
    for way, s, t in (("i2t", scores, truth), ("t2i", scores.T, truth.T)):
        for name, want in oracles.retrieval(s, t, tie).items():
            assert got[f"{way}_{name}"] == pytest.approx(want, abs=1e-9), (way, name)


def test_two_images_three_captions_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.6]])
    got = retrieval_metrics(scores, (torch.tensor([0, 1]), torch.tensor([0, 0, 1])))
    assert got["i2t_r1"] == 50.0  # image 0 finds caption 0; image 1 ranks caption 0 before its own caption 2
    assert got["t2i_r1"] == pytest.approx(200 / 3)
    assert got["rsum"] == pytest.approx(50 + 200 / 3 + 4 * 100)
    assert got["i2t_map_at_r"] == pytest.approx((0.5 + 0.0) / 2)  # image 0: hit at 1, miss at 2; image 1: miss at 1


def test_truth_by_ids_equals_truth_as_a_matrix_and_a_memory_mapped_file(tmp_path):
    scores = torch.randn(20, 60)
    ids = torch.randint(0, 20, (60,))
    ids[:20] = torch.arange(20)
    matrix = torch.arange(20)[:, None] == ids[None]
    np.save(tmp_path / "scores.npy", scores.numpy())
    mapped = np.load(tmp_path / "scores.npy", mmap_mode="r")
    assert retrieval_metrics(scores, (torch.arange(20), ids)) == retrieval_metrics(scores, matrix) == retrieval_metrics(mapped, matrix)


@pytest.mark.parametrize("tie", RULES)
def test_a_turned_matrix_ranks_as_its_copy_for_any_type_and_more_rows_than_a_byte_counts(tie):
    scores = torch.randint(0, 50, (600, 40))
    many = torch.randint(0, 40, (600,))  # about 15 positives a query
    few = torch.where(torch.arange(600) < 200, torch.arange(600) % 37, -1)  # 5 or 6, and three queries without any
    for kind in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        turned = scores.to(kind).T
        for owner in (many, few):
            got, want = (rank_queries(given, (torch.arange(40), owner), tie) for given in (turned, turned.contiguous()))
            for name in ("best", "positives", "average_precision", "r_precision"):
                assert torch.equal(getattr(got, name), getattr(want, name)), (kind, name)


def test_constant_scores_earn_nothing_when_ties_count_against_the_model():
    truth = torch.eye(12, dtype=torch.bool)
    assert retrieval_metrics(torch.ones(12, 12), truth)["rsum"] == 0.0
    assert retrieval_metrics(torch.ones(12, 12), truth, tie="optimistic")["rsum"] == pytest.approx(600.0)


def test_relevance_moves_only_the_equivalence_metrics():
    scores, annotated = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.eye(2, dtype=torch.bool)
    relevance = torch.tensor([[True, True], [False, True]])
    plain, wider = retrieval_metrics(scores, annotated), retrieval_metrics(scores, annotated, relevance)
    assert (plain["i2t_r1"], wider["i2t_r1"]) == (50.0, 50.0)
    assert (plain["i2t_map_at_r"], wider["i2t_map_at_r"]) == (0.5, 1.0)
    assert wider["i2t_semantic_r1"] == 100.0
    assert "i2t_semantic_r1" not in plain


def test_positives_outside_the_gallery_count_in_r_but_cannot_be_hit():
    ranking = rank_queries(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[True, False, False]]), absent=torch.tensor([1]))
    assert (float(ranking.average_precision), float(ranking.r_precision)) == (0.5, 0.5)


def test_the_inflated_iais_recall_counts_texts_with_a_small_row_number_twice():
    scores = torch.eye(40)
    got = retrieval_metrics(scores, torch.eye(40, dtype=torch.bool), tie="official_iais")
    assert [got[f"t2i_r{k}"] for k in (1, 5, 10)] == [pytest.approx(100 + 100 * k / 40) for k in (1, 5, 10)]
    assert got["i2t_r1"] == 100.0


def test_chance_equals_the_mean_over_many_random_orders():
    generator = torch.Generator().manual_seed(3)
    truth = torch.rand(12, 20, generator=generator) < 0.2
    truth[torch.arange(20) % 12, torch.arange(20)] = True
    runs = [retrieval_metrics(torch.rand(12, 20, generator=generator), truth, truth) for _ in range(600)]
    for name, want in chance_metrics(truth, truth).items():
        values = torch.tensor([run[name] for run in runs], dtype=torch.float64)
        assert abs(float(values.mean()) - want) < 5 * float(values.std()) / len(runs) ** 0.5 + 1e-9, name


def test_nan_scores_are_refused_with_their_number_and_first_place():
    scores = torch.zeros(3, 4)
    scores[1, 2] = scores[2, 0] = torch.nan
    with pytest.raises(ValueError, match="2 of 12 scores are NaN, the first at image 1, caption 2"):
        retrieval_metrics(scores, (torch.arange(3), torch.tensor([0, 1, 2, 0])))


def test_scores_of_another_shape_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(3, 4\), but the truth has 3 images x 5 captions"):
        retrieval_metrics(torch.zeros(3, 4), (torch.arange(3), torch.arange(5)))


def test_a_query_without_a_positive_is_refused():
    with pytest.raises(ValueError, match="1 of 2 images have no positive pair, the first is image 1"):
        retrieval_metrics(torch.zeros(2, 2), torch.tensor([[True, True], [False, False]]))


def test_an_unknown_tie_rule_is_refused():
    with pytest.raises(ValueError, match="unknown tie rule 'random'"):
        retrieval_metrics(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), tie="random")
