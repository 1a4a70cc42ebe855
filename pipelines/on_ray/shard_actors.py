"""Shards through two operators: Ray tasks that decode, then a pool of actors that hold a model and write what they make of a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from itm.data.formats import Json
from itm.data.shards import Sample, read_samples
from pipelines.on_ray.gpus import Seats, gpu_seats

ACTOR_CPUS = 0.25


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


def through_actors(
    rows: list[Json], prepare: Callable[[Any], Any], actor: type, given: Callable[[str], Sequence[Any]], wanted: int | None
) -> Iterator[Json]:
    """What the actors say of each row, in any order, without `error`, which is raised as ValueError.

    rows: one a shard. given: the arguments of an actor on a device. wanted: actors, unset = one for each GPU, or one without GPUs.

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
        .map_batches(prepare, batch_size=None, batch_format="pyarrow", num_cpus=min(core(), cpus // 2 or 0.5))
        .map_batches(
            actor,
            fn_constructor_args=tuple(given(seats.device)),
            compute=ray.data.ActorPoolStrategy(size=seats.count),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=ACTOR_CPUS,
            num_gpus=seats.gpus or None,
        )
    )
    for row in dataset.iter_rows():
        if (error := row.pop("error")) is not None:
            raise ValueError(error)
        yield row
