"""Ranks of answers and their chance, against a count over every order of a small gallery."""

from __future__ import annotations

import itertools

import pytest
import torch

from itm.evaluation.dataset import names_of
from itm.evaluation.metrics import rank_queries
from itm.evaluation.protocols import Scored
from itm.report.ranks import ranks_and_worst, spread


@pytest.mark.parametrize("positives", [1, 2, 3])
def test_chance_is_the_share_over_all_orders_of_the_gallery(positives: int):
    gallery = 7
    orders = list(itertools.permutations(range(gallery)))  # the first items are the positives
    ranks = [1 + min(order[item] for item in range(positives)) for order in orders]
    found = spread(torch.tensor([1]), torch.tensor([positives]), gallery)
    bounds = [*found["first"], gallery + 1]
    wanted = [sum(a <= rank < b for rank in ranks) / len(ranks) for a, b in itertools.pairwise(bounds)]
    assert found["chance"] == pytest.approx(wanted)


def test_shares_count_the_answers_of_each_interval_and_sum_to_one():
    found = spread(torch.tensor([1, 1, 4, 10, 11, 150]), torch.ones(6, dtype=torch.int64), 150)
    assert found["first"] == [1, 2, 3, 4, 5, 6, 11, 21, 51, 101]
    assert found["share"] == pytest.approx([2 / 6, 0, 0, 1 / 6, 0, 1 / 6, 1 / 6, 0, 0, 1 / 6])
    assert sum(found["chance"]) == pytest.approx(1.0)
    assert (found["queries"], found["gallery"]) == (6, 150)


def test_the_worst_queries_are_those_whose_own_answer_ranks_last_and_none_that_came_first():
    torch.manual_seed(5)
    scores, owners = torch.randn(9, 27), torch.arange(27) // 3
    ranks, worst = ranks_and_worst(Scored(scores, names_of(9, owners)), each=4)
    for way, by_query, annotated in (
        ("t2i", scores.T, owners[:, None] == torch.arange(9)),
        ("i2t", scores, torch.arange(9)[:, None] == owners),
    ):
        rank = rank_queries(by_query, annotated).best + 1
        assert [row["rank"] for row in worst[way]] == sorted(rank.tolist(), reverse=True)[:4]
        for row in worst[way]:
            answer = by_query[row["query"]].masked_fill(~annotated[row["query"]], -torch.inf).argmax()
            assert (row["answer"]["row"], row["rank"]) == (answer, rank[row["query"]])
        assert ranks[way]["share"][0] == pytest.approx(float((rank == 1).double().mean()))
    perfect = torch.where(torch.arange(9)[:, None] == owners, 1.0, 0.0)
    assert ranks_and_worst(Scored(perfect, names_of(9, owners)))[1] == {"t2i": [], "i2t": []}
