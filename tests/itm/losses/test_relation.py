"""Relation alignment: against a loop written from the formula, at the edges, and for padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from itm.losses.relation import isd, isda, relation_alignment_loss, relation_distances

SIZES = [(3, 4), (5, 2), (1, 3), (2, 1)]


def world(sizes=SIZES, width=(6, 5), dtype=torch.float64) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Random row-stochastic blocks, zero outside each pair's corner."""
    n, m = width
    blocks = []
    for rows, columns, pick in ((n, n, (0, 0)), (m, m, (1, 1)), (n, m, (0, 1)), (m, n, (1, 0))):
        block = torch.zeros(len(sizes), rows, columns, dtype=dtype)
        for g, size in enumerate(sizes):
            r, c = size[pick[0]], size[pick[1]]
            if r and c:
                block[g, :r, :c] = torch.randn(r, c, dtype=dtype).mul(2).softmax(-1)
        blocks.append(block)
    words, regions = (torch.tensor([s[i] for s in sizes]) for i in (0, 1))
    return tuple(blocks), torch.arange(n) < words[:, None], torch.arange(m) < regions[:, None]  # type: ignore[return-value]


def kl(a: Tensor, b: Tensor, eps: float) -> float:
    total = 0.0
    for row_a, row_b in zip(a.tolist(), b.tolist(), strict=True):
        for x, y in zip(row_a, row_b, strict=True):
            total += y * math.log(y) - y * math.log(x + eps) + x * math.log(x) - x * math.log(y + eps)
    return total / len(a)


def by_hand(blocks, g: int, size: tuple[int, int], anchor: str, kind: str) -> float:
    n, m = size
    ll, vv, lv, vl = (b[g, :r, :c] for b, (r, c) in zip(blocks, ((n, n), (m, m), (n, m), (m, n)), strict=True))
    own, other, cross, back = (ll, vv, lv, vl) if anchor == "L" else (vv, ll, vl, lv)
    if kind == "distributed":
        return kl(own, cross @ back, 1e-6)
    if kind == "soft":
        return kl(own.softmax(-1), (cross @ other @ cross.T).softmax(-1), 0.0)
    index = [max(range(len(row)), key=row.__getitem__) for row in cross.tolist()]
    return kl(own, torch.stack([torch.stack([other[i, j] for j in index]) for i in index]).softmax(-1), 0.0)


@pytest.mark.parametrize("anchor", ["L", "V"])
@pytest.mark.parametrize("kind", ["singular", "distributed", "soft"])
def test_each_distance_is_the_loop_over_pairs_rows_and_columns(kind, anchor):
    blocks, words, regions = world()
    want = [by_hand(blocks, g, size, anchor, kind) for g, size in enumerate(SIZES)]
    got = relation_distances(blocks, words, regions, anchor=anchor, kind=kind)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=1e-12)
    loss = relation_alignment_loss(blocks, words, regions, anchor=anchor, kind=kind)
    assert loss.item() == pytest.approx(sum(want) / len(want), abs=1e-12)


@pytest.mark.parametrize("kind", ["singular", "distributed", "soft"])
def test_more_padding_changes_neither_value_nor_gradient(kind):
    blocks, words, regions = world(width=(5, 4))
    padded = tuple(torch.nn.functional.pad(b, (0, 3, 0, 3)).requires_grad_() for b in blocks)
    blocks = tuple(b.requires_grad_() for b in blocks)
    small = relation_alignment_loss(blocks, words, regions, kind=kind)
    large = relation_alignment_loss(padded, *(torch.nn.functional.pad(m, (0, 3)) for m in (words, regions)), kind=kind)
    torch.testing.assert_close(small, large, atol=1e-12, rtol=0)
    for g, h in zip(*(torch.autograd.grad(x, y, allow_unused=True) for x, y in ((small, blocks), (large, padded))), strict=True):
        assert (g is None) == (h is None)
        if g is not None:
            assert torch.isfinite(h).all()
            torch.testing.assert_close(g, h[:, : g.shape[1], : g.shape[2]], atol=1e-12, rtol=0)


def test_a_single_word_has_nothing_to_align():
    blocks, words, regions = world([(1, 4)])
    assert relation_alignment_loss(blocks, words, regions).item() == 0.0
    assert abs(relation_alignment_loss(blocks, words, regions, kind="distributed").item()) < 3e-6


def test_pairs_without_words_or_regions_are_left_out():
    blocks, words, regions = world([(3, 4), (0, 3), (2, 0)])
    got = relation_distances(blocks, words, regions)
    assert got.shape == (1,)
    assert got.item() == pytest.approx(by_hand(blocks, 0, (3, 4), "L", "singular"))
    nothing = tuple(b[1:].requires_grad_() for b in blocks)
    loss = relation_alignment_loss(nothing, words[1:], regions[1:])
    loss.backward()
    assert loss.item() == 0.0


def test_an_exact_zero_in_the_anchor_stays_finite():
    blocks, words, regions = world([(3, 4)], dtype=torch.float32)
    blocks[0][0, 0, :3] = torch.tensor([1.0, 0.0, 0.0])
    for kind in ("singular", "distributed"):
        leaf = blocks[0].clone().requires_grad_()
        loss = relation_alignment_loss((leaf, *blocks[1:]), words, regions, kind=kind)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(leaf.grad).all()


def test_half_precision_blocks_are_computed_in_float32():
    blocks, words, regions = world(dtype=torch.float32)
    half = tuple(b.bfloat16() for b in blocks)
    assert relation_alignment_loss(half, words, regions).dtype == torch.float32


def test_singular_gives_no_gradient_to_the_index_and_soft_none_to_the_cross_block():
    blocks, words, regions = world()
    for kind, silent in (("singular", (2, 3)), ("soft", (2, 3)), ("distributed", (1,))):
        leaves = tuple(b.clone().requires_grad_() for b in blocks)
        gradients = torch.autograd.grad(relation_alignment_loss(leaves, words, regions, kind=kind), leaves, allow_unused=True)
        assert all(gradients[i] is None or not gradients[i].any() for i in silent)
        assert gradients[0].abs().sum() > 0


def test_counterparts_from_logits_or_renormalised_reach_zero_where_the_official_one_cannot():
    """With a one-to-one alignment and equal relations, only the second softmax keeps the distance from 0."""
    logits = torch.randn(1, 2, 4, 4, dtype=torch.float64) * 2
    own = logits.softmax(-1).mean(1)
    blocks, mask = (own, own, torch.eye(4, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[None]), torch.ones(1, 4).bool()
    values = {
        name: relation_alignment_loss(blocks, mask, mask, counterpart=name, logits=(logits, logits)).item()
        for name in ("softmax", "renormalise", "logits")
    }
    assert values["softmax"] > 0.1
    assert values["renormalise"] == pytest.approx(0, abs=1e-12)
    assert values["logits"] == pytest.approx(0, abs=1e-12)


def test_isd_reports_all_four_values_per_pair():
    blocks, words, regions = world()
    values = isd(blocks, words, regions)
    assert set(values) == {"L_singular", "V_singular", "L_distributed", "V_distributed"}
    assert all(v.shape == (len(SIZES),) for v in values.values())


def test_isda_of_two_entities_is_the_hand_computation():
    among_words = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]], dtype=torch.float64)
    among_regions = torch.tensor([[[0.9, 0.1], [0.4, 0.6]]], dtype=torch.float64)
    entity_words = torch.tensor([[[1, 1, 0], [0, 0, 1], [0, 0, 0]]])
    entity_regions = torch.tensor([[[1, 0], [0, 1], [0, 0]]])
    got = isda(among_words, among_regions, entity_words, entity_regions)
    left, right = [[0.75, 0.25], [0.4, 0.6]], [[0.9, 0.1], [0.4, 0.6]]
    rows = [sum((a - b) * (math.log(a) - math.log(b)) for a, b in zip(x, y, strict=True)) for x, y in zip(left, right, strict=True)]
    torch.testing.assert_close(got.words[0, :2, :2], torch.tensor(left, dtype=torch.float64))
    assert got.sum.item() == pytest.approx(sum(rows))
    assert got.mean.item() == pytest.approx(sum(rows) / 2)


def test_isda_of_one_entity_is_refused():
    block = torch.full((1, 2, 2), 0.5)
    with pytest.raises(ValueError, match="at least two entities"):
        isda(block, block, torch.tensor([[[1, 0]]]), torch.tensor([[[1, 0]]]))


@pytest.mark.parametrize("options", [{"anchor": "T"}, {"kind": "double"}, {"counterpart": "none"}, {"counterpart": "logits"}])
def test_unknown_choices_are_refused(options):
    with pytest.raises(ValueError, match=r"unknown|logits"):
        relation_alignment_loss(*world(), **options)
