"""Shards through two operators: Ray tasks that decode, then a pool of actors that hold a model and write what they make of a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from itm.data.formats import Json
from itm.data.patience import ASKED
from itm.data.shards import Sample, read_samples
from pipelines.on_ray.gpus import Seats, gpu_seats

ACTOR_CPUS = 0.25
COUNTS = ["store_asked_again", "store_waited_s"]


@dataclass(frozen=True)
class ShardJob:
    """One file to make: from the shard `source` of this sha256, into `target`. split: the folder that its split has there."""

    source: str
    sha256: str
    target: str
    split: str
    made_from: str

    def samples(self) -> Iterator[Sample]:
        """Those of the shard that can be read. Raises ValueError for a shard that is another one by now."""
        return (item for item in read_samples(self.source, self.sha256) if isinstance(item, Sample))


@dataclass(frozen=True)
class Counted:
    """`prepare`; what it gives has two columns more: how often a store was asked again in it, and the seconds that passed."""

    prepare: Callable[[Any], pa.Table]

    def __call__(self, rows: pa.Table) -> pa.Table:
        again, waited = ASKED.again, ASKED.waited
        return _with_counts(self.prepare(rows), ASKED.again - again, ASKED.waited - waited)


class CountedActor:
    """An actor; to the counts of what was prepared for it, it adds its own since it last answered."""

    def __init__(self, actor: type, *given: Any) -> None:
        self.told = ASKED.again, ASKED.waited
        self.actor = actor(*given)

    def __call__(self, rows: pa.Table) -> pa.Table:
        again, waited = (sum(rows[name].to_pylist()) for name in COUNTS)
        made = self.actor(rows.drop_columns(COUNTS))
        told, self.told = self.told, (ASKED.again, ASKED.waited)
        return _with_counts(made, again + self.told[0] - told[0], waited + self.told[1] - told[1])


def _with_counts(rows: pa.Table, again: int, waited: float) -> pa.Table:
    """The counts stand in the first row."""
    rest = [0] * (len(rows) - 1)
    counts = pa.array([again, *rest], pa.int64()), pa.array([waited, *rest], pa.float64())
    return rows.append_column(COUNTS[0], counts[0]).append_column(COUNTS[1], counts[1])


def through_actors(
    rows: list[Json], prepare: Callable[[Any], Any], actor: type, given: Callable[[str], Sequence[Any]], wanted: int | None
) -> Iterator[Json]:
    """What the actors say of each row, in any order, without `error`, which is raised as ValueError.

    rows: one a shard. given: the arguments of an actor on a device. wanted: actors, unset = one for each GPU, or one without GPUs.

    How often a store was asked again by them is added to what this process has counted.

    A shard travels as ONE Arrow row with list columns, so that Ray can neither split nor merge it. Actors take at most half of the CPUs,
    a quarter each: if they held all of them they would wait for ever for the tasks that feed them.
    """
    import ray

    from pipelines.on_ray.session import connect, core

    connect()
    seats = gpu_seats(wanted, len(rows), 2 * ACTOR_CPUS)
    cpus = ray.cluster_resources().get("CPU", 0)
    if seats is None:
        seats = Seats(max(1, min(wanted or 1, len(rows), int(cpus / 2 / ACTOR_CPUS))), 0, "cpu")
    dataset = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(Counted(prepare), batch_size=None, batch_format="pyarrow", num_cpus=min(core(), cpus // 2 or 0.5))
        .map_batches(
            CountedActor,
            fn_constructor_args=(actor, *given(seats.device)),
            compute=ray.data.ActorPoolStrategy(size=seats.count),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=ACTOR_CPUS,
            num_gpus=seats.gpus or None,
        )
    )
    for row in dataset.iter_rows():
        again, waited = (row.pop(name) for name in COUNTS)
        ASKED.add(waited, again)
        if (error := row.pop("error")) is not None:
            raise ValueError(error)
        yield row
