"""Ray Data executes a plan: work items -> reading and preprocessing actors -> the batches of one rank, in planned order.

A work item names a few per-rank batches by number: the actor knows the plan, a pure function, and reads the byte ranges that it
names. Each Ray Train worker streams its own items from its checkpoint's position on, so restarting a worker group, with as many or
fewer workers, neither loses nor repeats a pair; no shuffle service, no split coordinator, no join.

Images are decoded where the recipe says (`data.decode`): in the actors, which may be on other machines, or in threads of the
trainer, which then gets the encoded bytes: a tenth of the traffic, and actors that start without torch.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from itm.data.arrow import Columns, to_columns
from itm.data.fetch import Fetch, Work
from itm.device import cores
from pipelines.on_ray.session import set_up_data

if TYPE_CHECKING:
    from itm.data.pairs import Pairs

SEGMENT = 2048
"""Work items per Ray Data execution: bounds the driver's bookkeeping in runs of a million steps."""
FETCHED_ROWS, FETCHED_BYTES = 512, 32 << 20
"""What one item fetches undecoded, at most: the fewer the tasks the less Ray costs, but some have to fit its store together."""

MOST_DECODERS = 16
"""More threads than that wait for each other: all that is not decoding or resizing holds the lock of the interpreter."""

A = TypeVar("A")
B = TypeVar("B")


class FetchActor:
    """Reads planned pairs as they are; holds the plan, shard indexes, open shards and sidecars."""

    CPUS = 0.0
    """What Ray reserves: where trainers hold every CPU, an actor that asked for a share would wait for ever, and they for it."""

    def __init__(self, fetch: Fetch) -> None:
        self.batch_of: Callable[[Work], pa.Table] = fetch
        self.rows = fetch.plan.batch

    def __call__(self, items: pa.Table) -> pa.Table:
        """The batches of one item. An error for the user comes back as rows: raised here, it would reach him buried in Ray's own."""
        (item,) = items.to_pylist()
        try:
            return pa.concat_tables([self.batch_of(Work(**work)) for work in item["work"]]).combine_chunks()
        except (OSError, ValueError) as error:
            return pa.table({"error": [str(error)] * self.rows})


class PrepareActor(FetchActor):
    """Decodes, augments and tokenises as well, for which some CPU has to be left by the trainers."""

    CPUS = 0.25

    def __init__(self, pairs: Pairs) -> None:
        import torch

        torch.set_num_threads(1)
        self.batch_of, self.rows = pairs, pairs.fetch.plan.batch


def decoders(wanted: int | None, gpu: bool) -> int:
    """How many actors or threads decode for a trainer: `wanted` (data.decode_workers). Batches and their order are the same for any.

    Unset: one beside a trainer that needs the cores itself, and for a GPU all cores of its share of the machine but the trainer's.
    """
    if wanted is not None:
        return wanted
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine; Ray Train and torchrun tell it
    return max(1, min(MOST_DECODERS, cores() // trainers - 1)) if gpu else 1


def work_of(rank: int, first: int, last: int, accumulate: int) -> list[Work]:
    """The items of one rank for steps [first, last)."""
    return [Work(step, micro, rank) for step in range(first, last) for micro in range(accumulate)]


def stream(pairs: Pairs, work: Sequence[Work], decode: str, workers: int) -> Iterator[Columns]:
    """The batches of `work`, in its order, through Ray Data; decoded by `workers` actors, or threads of this process (decode=trainer).

    Raises ValueError as `Pairs` does.
    """
    if decode == "trainer":
        shards = pairs.fetch.manifest.shards
        rows = min(FETCHED_ROWS, FETCHED_BYTES * sum(s.samples for s in shards) // sum(s.bytes for s in shards))
        together = max(1, rows // pairs.fetch.plan.batch)
        yield from in_threads(pairs.prepare, _tables(FetchActor, pairs.fetch, work, together, 1), workers)
    else:
        yield from map(to_columns, _tables(PrepareActor, pairs, work, 1, workers))


def _tables(actor: type[FetchActor], given: Any, work: Sequence[Work], together: int, actors: int) -> Iterator[pa.Table]:
    """One table for each of `work`; an item has `together` of them."""
    import ray
    from ray.data import ActorPoolStrategy

    set_up_data().execution_options.preserve_order = True
    groups = [work[i : i + together] for i in range(0, len(work), together)]
    for begin in range(0, len(groups), SEGMENT):
        segment = [{"work": [vars(w) for w in group]} for group in groups[begin : begin + SEGMENT]]
        # One block an item keeps items apart: several in one task would be merged into one output block.
        items = ray.data.from_items(segment, override_num_blocks=len(segment))
        tables = items.map_batches(
            actor,
            fn_constructor_args=(given,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=4),
            num_cpus=actor.CPUS,
        )
        batch = given.plan.batch if isinstance(given, Fetch) else given.fetch.plan.batch
        blocks: Any = tables.iter_batches(batch_size=batch, batch_format="pyarrow", prefetch_batches=2)
        for table in blocks:
            if "error" in table.column_names:
                raise ValueError(table["error"][0].as_py())
            yield table


def stream_here(pairs: Pairs, work: Sequence[Work], threads: int) -> Iterator[Columns]:
    """The same batches in the same order, read and prepared by threads of this process."""
    return in_threads(lambda item: pairs.prepare(pairs.fetch.read(item)), work, threads)


def in_threads(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """`map(function, items)` by threads that work a little ahead of their reader."""
    waiting: deque[Future[B]] = deque()
    rest = iter(items)
    with ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:
        waiting.extend(pool.submit(function, item) for item in islice(rest, threads + 2))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield done
