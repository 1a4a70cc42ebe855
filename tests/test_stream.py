from __future__ import annotations

from pathlib import Path

import pytest

from itm.data.pairs import Work
from itm.data.plan import Plan
from pipelines.stream import stream, stream_here, work_of
from tests.test_pairs import world


def test_threads_give_the_planned_batches_in_order(tmp_path: Path) -> None:
    pairs = world(tmp_path)
    tables = list(stream_here(pairs, work_of(0, 0, 9, 1), threads=2))
    assert len(tables) == 9
    for step, table in enumerate(tables):
        assert table.equals(pairs(Work(step, 0, 0)))


@pytest.mark.e2e
def test_ray_data_gives_the_planned_batches_in_order_for_every_rank(tmp_path: Path, ray_local: object) -> None:
    pairs = world(tmp_path, batch=3)
    pairs.plan = Plan.of(pairs.manifest, seed=0, batch=3, ranks=2, accumulate=2, window=2)
    for rank in range(2):
        items = work_of(rank, 1, 6, 2)
        tables = list(stream(pairs, items, actors=2))
        assert len(tables) == len(items) == 10
        for item, table in zip(items, tables, strict=True):
            assert table.equals(pairs(item)), item


@pytest.mark.e2e
def test_what_an_actor_raises_for_the_user_reaches_the_driver(tmp_path: Path, ray_local: object) -> None:
    pairs = world(tmp_path, broken=tuple(range(24)))
    with pytest.raises(ValueError, match="not one of the 6 pairs"):
        list(stream(pairs, work_of(0, 0, 2, 1), actors=1))
