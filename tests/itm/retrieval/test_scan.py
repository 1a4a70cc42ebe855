from __future__ import annotations

import torch

from itm.retrieval.scan import best, top


def test_blocks_give_what_sorting_all_scores_gives_and_ties_go_to_the_first_row():
    torch.manual_seed(0)
    scores = torch.randint(0, 9, (5, 1000)).float()  # full of ties
    order = scores.sort(dim=1, descending=True, stable=True).indices
    for k in (1, 7, 300, 1000, 2000):
        values, rows = best(lambda block: scores[:, block], 1000, None, k, 64)
        assert torch.equal(rows, order[:, :k])
        assert torch.equal(values, scores.gather(1, rows))


def test_chosen_rows_alone_are_scored():
    torch.manual_seed(0)
    scores = torch.rand(3, 100)
    rows = torch.arange(0, 100, 3)
    values, found = best(lambda block: scores[:, block], 100, rows, 4, 10)
    wanted = scores[:, rows].topk(4)
    assert torch.equal(values, wanted.values)
    assert torch.equal(found, rows[wanted.indices])


def test_the_top_of_a_constant_row_is_its_beginning():
    assert top(torch.zeros(1, 50), 3)[1].tolist() == [[0, 1, 2]]
