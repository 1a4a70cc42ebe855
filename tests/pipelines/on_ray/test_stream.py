from __future__ import annotations

import time
from pathlib import Path

import pytest

from itm.data.arrow import to_table
from itm.data.pairs import Work
from itm.data.plan import Plan
from itm.data.records import Caption, Record
from itm.data.shards import write_shard
from itm.device import cores
from pipelines.on_ray.feeding import HANDOVER, LABEL, PROBE, WARM, Feeders, feeders
from pipelines.on_ray.session import set_up_data
from pipelines.on_ray.stream import decoders, stream, stream_auto, stream_here, work_of
from tests.support.columns import equal
from tests.support.noise_split import png, world


def test_threads_give_the_planned_batches_in_order(tmp_path: Path) -> None:
    """More of them than are held at once: the memory of those that were let go is used again."""
    pairs, another = world(tmp_path), world(tmp_path / "equal")
    step = 0
    for step, columns in enumerate(stream_here(pairs, work_of(0, 0, 40, 1), threads=2), 1):
        here, there = to_table(columns), another(Work(step - 1, 0, 0))
        assert here.drop_columns("image_id").equals(there.drop_columns("image_id"))  # an image of another folder has another id
    assert step == 40
    assert len(pairs.buffers.arrays) < 8


def test_batches_and_their_order_are_the_same_bytes_for_any_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    pairs = world(tmp_path)
    one, *others = ([to_table(c) for c in stream_here(pairs, work_of(0, 0, 20, 1), threads)] for threads in (1, 2, 7))
    assert len(one) == 20
    assert all(other[k].equals(one[k]) for other in others for k in range(20))


def test_a_gpu_gets_the_cores_of_its_share_of_the_machine_and_a_cpu_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr("itm.device.CGROUP", tmp_path)
    assert (cores(), decoders(None, gpu=True), decoders(None, gpu=False), decoders(5, gpu=True)) == (64, 16, 1, 5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert decoders(None, gpu=True) == 7
    for limit, wanted in (("max 100000", 64), ("800000 100000", 8), ("50000 100000", 1)):  # a container's, in microseconds a period
        (tmp_path / "cpu.max").write_text(limit + "\n")
        assert cores() == wanted
    assert decoders(None, gpu=True) == 1


@pytest.mark.e2e
@pytest.mark.parametrize("decode", ["actors", "trainer"])
def test_ray_data_gives_the_planned_batches_in_order_for_every_rank(tmp_path: Path, ray_local: object, decode: str) -> None:
    pairs = world(tmp_path, batch=3)
    pairs.fetch.plan = Plan.of(pairs.fetch.manifest, seed=0, batch=3, ranks=2, accumulate=2, window=2)
    for rank in range(2):
        items = work_of(rank, 1, 6, 2)
        batches = list(stream(pairs, items, decode, 2))
        assert len(batches) == len(items) == 10
        for item, columns in zip(items, batches, strict=True):
            assert equal(columns, pairs(item)), item


@pytest.mark.e2e
def test_what_an_actor_raises_for_the_user_reaches_the_driver(tmp_path: Path, ray_local: object) -> None:
    pairs = world(tmp_path, broken=tuple(range(24)))
    with pytest.raises(ValueError, match="not one of the 6 pairs"):
        list(stream(pairs, work_of(0, 0, 2, 1), "actors", 1))
    write_shard(f"{tmp_path}/train/00000.tar", [Record("other", "train", [Caption("c", "a red thing")], png(0), "png")])
    with pytest.raises(ValueError, match="the shard changed after the manifest"):
        list(stream(pairs, work_of(0, 0, 2, 1), "trainer", 1))


@pytest.mark.e2e
def test_a_stream_whose_reader_is_slow_leaves_the_core_to_it(tmp_path: Path, ray_local: object) -> None:
    pairs = world(tmp_path)
    from ray.data import ExecutionResources

    options = set_up_data().execution_options
    free, options.resource_limits = options.resource_limits, ExecutionResources(object_store_memory=1 << 20)
    try:
        batches = stream(pairs, work_of(0, 0, 40_000, 1), "trainer", 1)
        next(batches)
        time.sleep(5)  # as much is read ahead now as Ray Data allows
        before = time.process_time()
        time.sleep(4)
        assert time.process_time() - before < 1.5, "the scheduling loop of Ray Data spins"
    finally:
        options.resource_limits = free
        batches.close()


@pytest.mark.e2e
@pytest.mark.parametrize("feeds", [True, False])
def test_batches_stay_as_planned_when_actors_take_over_from_threads_that_are_too_slow(
    tmp_path: Path, ray_local: object, feeds: bool
) -> None:
    """That its own threads may have time does not matter: another trainer's have none."""
    pairs = world(tmp_path, batch=3)
    items, said = work_of(0, 1, WARM + PROBE + HANDOVER + 6, 1), []

    def find() -> Feeders:
        import ray

        [node] = ray.nodes()
        return feeders([node | {"Labels": {LABEL: "true"} if feeds else {}}], gpu=False, trainers=1, most=2)

    batches = list(stream_auto(pairs, items, 1, find, lambda step, text: said.append((step, text)), lambda share: 1.0))
    assert len(batches) == len(items)
    assert all(equal(columns, pairs(item)) for item, columns in zip(items, batches, strict=True))
    [(step, text)] = said
    assert step == items[WARM + PROBE].step
    assert ("2 actors a trainer decode on" in text) == feeds, text


def test_the_items_of_a_rank_are_made_as_they_are_asked_for_in_the_order_of_steps_and_micro_steps() -> None:
    expected = [Work(step, micro, 3) for step in range(5, 9) for micro in range(2)]
    items = work_of(3, 5, 9, 2)
    assert (list(items), len(items), items[0], items[-1]) == (expected, 8, expected[0], expected[-1])
    assert list(items[3:6]) == expected[3:6] and list(items[5:][1:]) == expected[6:]
    assert not work_of(0, 4, 4, 2)
    assert len(work_of(0, 0, 10**12, 4)) == 4 * 10**12, "a list would not fit"
    with pytest.raises(IndexError):
        items[8]
