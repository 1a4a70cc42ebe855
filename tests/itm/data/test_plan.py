from __future__ import annotations

import pickle

import numpy as np
import pytest

from itm.data.manifest import Manifest, ShardInfo
from itm.data.plan import Plan, Position, expected_same_image_share, window_of


def manifest(counts: list[int]) -> Manifest:
    shards = [ShardInfo(name=f"{i:05d}.tar", samples=c, captions=c, bytes=1, sha256=str(i)) for i, c in enumerate(counts)]
    return Manifest(split="train", source="test", shards=shards)


COUNTS = [7, 5, 9, 4, 8, 3]


def stream(plan: Plan, first: int, last: int) -> list[tuple[int, int]]:
    """The pairs of steps [first, last) in global order."""
    rows = [plan.batch_pairs(s, m, r) for s in range(first, last) for m in range(plan.accumulate) for r in range(plan.ranks)]
    return [tuple(pair) for pair in np.concatenate(rows).tolist()]


def test_an_epoch_holds_every_pair_once_but_the_dropped_rest() -> None:
    plan = Plan.of(manifest(COUNTS), seed=0, batch=4, window=2)
    assert plan.steps_per_epoch == sum(COUNTS) // 4
    whole = plan.epoch_pairs(0, 0, plan.pairs)
    every = {(s, c) for s, count in enumerate(COUNTS) for c in range(count)}
    assert {tuple(p) for p in whole.tolist()} == every
    assert stream(plan, 0, plan.steps_per_epoch) == [tuple(p) for p in whole[: plan.steps_per_epoch * 4].tolist()]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    plan, other = (Plan.of(manifest(COUNTS), seed=seed, batch=4, window=2) for seed in (0, 1))
    first, second = plan.epoch_pairs(0, 0, 36), plan.epoch_pairs(1, 0, 36)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other.epoch_pairs(0, 0, 36))
    np.testing.assert_array_equal(first, Plan.of(manifest(COUNTS), seed=0, batch=9, window=2).epoch_pairs(0, 0, 36))


def test_a_window_bounds_how_far_a_pair_travels() -> None:
    plan = Plan.of(manifest([10] * 12), seed=3, batch=5, window=3)
    order = plan.epoch_pairs(0, 0, 120)
    for begin in range(0, 120, 30):
        assert len(set(order[begin : begin + 30, 0].tolist())) == 3
    assert len(set(order[:5, 0].tolist())) > 1


@pytest.mark.parametrize(("ranks", "batch", "accumulate"), [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2)])
def test_the_order_does_not_depend_on_the_number_of_ranks(ranks: int, batch: int, accumulate: int) -> None:
    one = Plan.of(manifest(COUNTS), seed=5, batch=8, window=2)
    many = Plan.of(manifest(COUNTS), seed=5, batch=batch, ranks=ranks, accumulate=accumulate, window=2)
    assert many.steps_per_epoch == one.steps_per_epoch
    assert stream(many, 0, 9) == stream(one, 0, 9)


def test_a_resumed_plan_gives_what_the_first_would_have_given() -> None:
    plan = Plan.of(manifest(COUNTS), seed=1, batch=4, window=2)
    for step in range(20):
        resumed = plan.resume(plan.locate(step))
        assert stream(resumed, step, 25) == stream(plan, step, 25)


def test_another_world_size_goes_on_at_the_same_pair() -> None:
    plan = Plan.of(manifest(COUNTS), seed=1, batch=4, window=2)
    position = plan.locate(5)
    wider = Plan.of(manifest(COUNTS), seed=1, batch=4, ranks=2, window=2).resume(position)
    assert stream(wider, 5, 7) == stream(plan, 5, 9)
    assert wider.locate(7) == Position(7, 1, 0)  # 16 of 36 pairs are left: two steps of 8, then the next epoch


def test_too_few_pairs_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"36 pairs in 6 shards.*global batch of 64.*16.*x 4 \(workers\)"):
        Plan.of(manifest(COUNTS), seed=0, batch=16, ranks=4)


def test_fewer_shards_than_workers_still_give_every_rank_equal_steps() -> None:
    plan = Plan.of(manifest([64]), seed=0, batch=4, ranks=8)
    assert len(set(stream(plan, 0, plan.steps_per_epoch))) == 64


def test_the_digest_tells_another_order_apart() -> None:
    plan = Plan.of(manifest(COUNTS), seed=1, batch=4, window=2)
    position = plan.locate(3)
    plan.check_digest(position, plan.digest(position), "step 3")
    for other in (
        Plan.of(manifest(COUNTS), seed=2, batch=4, window=2),
        Plan.of(manifest(COUNTS), seed=1, batch=4, window=3),
        Plan.of(manifest([*COUNTS, 1]), seed=1, batch=4, window=2),
    ):
        with pytest.raises(ValueError, match=r"another order.*--overwrite"):
            other.check_digest(position, plan.digest(position), "step 3")


def test_planning_reads_counts_alone_so_ten_thousand_shards_cost_little() -> None:
    plan = Plan.of(manifest([5000] * 10_000), seed=0, batch=256, ranks=8)
    assert plan.batch_pairs(plan.steps_per_epoch - 1, 0, 7).shape == (256, 2)
    assert plan.pairs == 50_000_000


@pytest.mark.parametrize(("pairs", "images", "batch"), [(50, 10, 6), (60, 20, 12), (40, 8, 38), (12, 12, 5)])
def test_the_expected_share_of_same_image_pairs_is_what_random_batches_show(pairs: int, images: int, batch: int) -> None:
    draws, found = np.random.default_rng(0), []
    for _ in range(4000):
        image = draws.permutation(pairs)[:batch] % images
        found.append(np.mean((image[:, None] == image).sum(1) > 1))
    assert expected_same_image_share(pairs, images, batch) == pytest.approx(np.mean(found), abs=0.01)


def test_the_expected_share_of_flickr30k_and_coco_is_that_of_the_published_loaders() -> None:
    assert expected_same_image_share(145_000, 29_000, 128) == pytest.approx(0.0035, abs=1e-4)
    assert expected_same_image_share(566_435, 113_287, 128) == pytest.approx(0.0009, abs=1e-4)
    assert expected_same_image_share(10_000, 2_000, 128) == pytest.approx(0.0496, abs=1e-3)  # eight shards of 250 images


def test_pairs_that_are_shuffled_together_are_rounded_up_to_whole_shards_or_are_all() -> None:
    held = manifest([10] * 12)
    assert [window_of(held, 8, pairs) for pairs in (None, 1, 10, 11, 95, 10_000, "all")] == [8, 1, 1, 2, 10, 12, 12]


def test_what_a_step_asks_of_a_plan_takes_no_longer_with_a_thousand_times_the_shards() -> None:
    """Counted, not timed: a second sum or hash over the shards would be seen."""
    looks = 0

    class Watched(int):
        def __hash__(self) -> int:
            nonlocal looks
            looks += 1
            return super().__hash__()

        def __radd__(self, other: int) -> int:
            nonlocal looks
            looks += 1
            return int(self) + other

    plan = Plan(tuple(Watched(4) for _ in range(5000)), "m", 0, batch=8, window=2)
    plan.batch_pairs(0, 0, 0)
    before = looks
    for step in range(1, 50):
        plan.locate(step)
        plan.resume(plan.locate(step)).batch_pairs(step, 0, 0)
    assert looks == before >= 10_000, "each shard was looked at for the sum and for the hash, once"


def test_counts_are_the_tuple_that_they_were_in_hashes_equality_and_pickles() -> None:
    plain = (3, 4, 5)
    counts = Plan(plain, "m", 0, batch=2).counts
    assert (counts, hash(counts), sum(plain)) == (plain, hash(plain), Plan(plain, "m", 0, batch=2).pairs)
    assert pickle.loads(pickle.dumps(counts)) == plain
    assert Plan(plain, "m", 0, batch=2) == Plan(counts, "m", 0, batch=2)
