"""Several roots as one split: exact shares, every pair of each root in its own order, and the same pairs for any ranks and resumptions."""

from __future__ import annotations

import numpy as np
import pytest

from itm.data.manifest import Manifest, ShardInfo
from itm.data.mix import _BLOCK, MixedPlan, MixedStore, Mixture, drawn, folders_of, plan_of
from itm.data.plan import Plan
from itm.data.sidecar import Store


def manifest(*counts: int, salt: str = "") -> Manifest:
    shards = [ShardInfo(name=f"{n}.tar", samples=1, captions=c, bytes=1, sha256=f"{salt}{n}") for n, c in enumerate(counts)]
    return Manifest(split="train", source="test", shards=shards)


def mixture(weights: tuple[float, ...], *manifests: Manifest) -> Mixture:
    return Mixture("train", tuple(f"root{n}/train" for n in range(len(weights))), weights, manifests)


A, B, C = manifest(7, 12, 5), manifest(40, 31, salt="b"), manifest(3, salt="c")
MIX = mixture((0.5, 3, 0.2), A, B, C)


def all_pairs(plan: Plan, count: int) -> np.ndarray:
    epochs = [plan.epoch_pairs(epoch, 0, plan.pairs) for epoch in range(-(-count // plan.pairs))]
    return np.concatenate(epochs)[:count]


def test_of_whole_blocks_each_root_gives_its_share_to_a_pair():
    pairs = all_pairs(plan_of(MIX, seed=3, batch=4, window=2), 3 * _BLOCK)
    for blocks in (1, 2, 3):
        roots = MIX.root_of(pairs[: blocks * _BLOCK, 0])
        for root, weight in enumerate(MIX.weights):
            assert abs((roots == root).sum() - blocks * _BLOCK * weight / 3.7) < 3
    thirds = MIX.root_of(pairs[:, 0]).reshape(-1, 512)  # they are interleaved, not one behind the other
    assert (np.abs((thirds == 1).mean(1) - 3 / 3.7) < 0.1).all()


def test_numbers_drawn_add_up_never_fall_and_are_exact_for_weights_that_are_no_binary_fractions():
    before = [0, 0, 0]
    for pairs in range(0, 700):
        counts = drawn((0.1, 0.2, 0.7), pairs)
        assert sum(counts) == pairs
        assert all(now >= then for now, then in zip(counts, before, strict=True))
        before = counts
    assert drawn((0.1, 0.2, 0.7), 10**12) == [10**11, 2 * 10**11, 7 * 10**11]


def test_each_root_is_gone_through_epoch_after_epoch_and_every_pair_comes_once_an_epoch():
    pairs = all_pairs(plan_of(MIX, seed=3, batch=4, window=2), 3 * _BLOCK)
    first = 0
    for root, held in enumerate((A, B, C)):
        own = pairs[MIX.root_of(pairs[:, 0]) == root] - [first, 0]
        whole = {(shard, row) for shard, info in enumerate(held.shards) for row in range(info.captions)}
        for epoch in range(len(own) // held.captions):
            seen = own[epoch * held.captions : (epoch + 1) * held.captions].tolist()
            assert sorted(map(tuple, seen)) == sorted(whole)
        first += len(held.shards)


def test_a_mixture_of_one_root_is_that_root():
    alone, mixed = (plan_of(m, seed=5, batch=3, window=2) for m in (B, mixture((2.0,), B)))
    for step in range(60):
        assert np.array_equal(alone.batch_pairs(step, 0, 0), mixed.batch_pairs(step, 0, 0))


@pytest.mark.parametrize(("ranks", "batch"), [(1, 8), (2, 4), (4, 2)])
def test_any_number_of_ranks_sees_the_same_pairs_also_after_a_resumption(ranks, batch):
    one = plan_of(MIX, seed=1, batch=8, window=2)
    many = plan_of(MIX, seed=1, batch=batch, ranks=ranks, window=2)
    steps = [np.concatenate([many.batch_pairs(step, 0, r) for r in range(ranks)]) for step in range(30)]
    assert all(np.array_equal(one.batch_pairs(step, 0, 0), pairs) for step, pairs in enumerate(steps))
    resumed = many.resume(many.locate(17))
    assert isinstance(resumed, MixedPlan)
    assert all(np.array_equal(np.concatenate([resumed.batch_pairs(s, 0, r) for r in range(ranks)]), steps[s]) for s in range(17, 30))


def test_other_weights_another_order_of_roots_or_other_shards_are_another_order_of_the_data():
    others = [MIX, mixture((1, 3, 0.2), A, B, C), mixture((3, 0.5, 0.2), B, A, C), mixture((0.5, 3, 0.2), A, B, manifest(4, salt="c"))]
    plans = [plan_of(m, seed=1, batch=8, window=2) for m in others]
    position = plans[0].locate(5)
    assert len({plan.digest(position) for plan in plans}) == 4
    with pytest.raises(ValueError, match="another order of the data"):
        plans[1].check_digest(position, plans[0].digest(position), "checkpoint")


def test_shards_know_their_root():
    assert folders_of("", MIX) == ["root0/train"] * 3 + ["root1/train"] * 2 + ["root2/train"]
    assert folders_of("x/train", A) == ["x/train"] * 3
    assert (MIX.captions, MIX.samples, len(MIX.shards)) == (98, 6, 6)
    with pytest.raises(ValueError, match="root1/train holds 1 images without captions"):
        mixture((1, 1), A, manifest(0)).check_captioned("", "trained on")


def test_stores_of_different_teachers_are_refused_and_a_shard_is_found_by_its_bytes():
    stores = [Store(f"root{n}/train/teachers", "text", "fp16", 2, {"kind": k}, {}) for n, k in enumerate(("a", "b"))]
    with pytest.raises(ValueError, match=r"different teachers, root0/train/teachers and root1/train/teachers"):
        MixedStore(tuple(stores))
    with pytest.raises(ValueError, match=r"no root of data\.mix has a sidecar of 0\.tar with sha256 abc"):
        MixedStore((stores[0],)).sidecar("0.tar", "abc")
