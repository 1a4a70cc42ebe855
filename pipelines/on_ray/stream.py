"""Ray Data executes a plan: work items -> reading and preprocessing actors -> the batches of one rank, in planned order.

A work item names a few per-rank batches by number: the actor knows the plan, a pure function, and reads the byte ranges that it
names. Each Ray Train worker streams its own items from its checkpoint's position on, so restarting a worker group, with as many or
fewer workers, neither loses nor repeats a pair; no shuffle service, no split coordinator, no join.

Images are decoded where the recipe says (`data.decode`): in the actors, which may be on other machines, or in threads of the
trainer, which then gets the encoded bytes: a tenth of the traffic, and actors that start without torch. `auto` begins with the threads
and goes over to actors where those are too slow and other nodes have cores for it (`pipelines/on_ray/feeding.py`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, overload

import pyarrow as pa

from itm.data.arrow import Columns, to_columns
from itm.data.fetch import Fetch, Work
from itm.device import cores
from pipelines.on_ray.feeding import BUSY, HANDOVER, Feeders, Watched, measured, words
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


class Items(Sequence[Work]):
    """The items of one rank for steps [first, last), made when they are asked for: a run may have millions of them."""

    def __init__(self, rank: int, accumulate: int, numbers: range) -> None:
        self.rank, self.accumulate, self.numbers = rank, accumulate, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> Work: ...

    @overload
    def __getitem__(self, at: slice) -> Items: ...

    def __getitem__(self, at: int | slice) -> Work | Items:
        if isinstance(at, slice):
            return Items(self.rank, self.accumulate, self.numbers[at])
        return Work(*divmod(self.numbers[at], self.accumulate), self.rank)


def work_of(rank: int, first: int, last: int, accumulate: int) -> Items:
    """The items of one rank for steps [first, last)."""
    return Items(rank, accumulate, range(first * accumulate, last * accumulate))


def stream(pairs: Pairs, work: Sequence[Work], decode: str, workers: int) -> Iterator[Columns]:
    """The batches of `work`, in its order, through Ray Data; decoded by `workers` actors, or threads of this process (decode=trainer).

    Raises ValueError as `Pairs` does.
    """
    if decode == "trainer":
        yield from in_threads(pairs.prepare, _fetched(pairs, work), workers)
    else:
        yield from map(to_columns, _tables(PrepareActor, pairs, work, 1, workers))


def stream_auto(
    pairs: Pairs,
    work: Sequence[Work],
    threads: int,
    find: Callable[[], Feeders],
    say: Callable[[int, str], None],
    most: Callable[[float], float],
) -> Iterator[Columns]:
    """As `stream`, by threads of this process until they turn out too slow, and by actors on the nodes that `find` knows from then on.

    say: is told once, with the step, what was decided, and why. most: the largest of what all trainers measured, so that they decide alike:
    each step waits for the slowest of them, whose threads alone may be busy.
    """
    prepare, threads = Watched(pairs.prepare), min(threads, os.cpu_count() or 1)
    own = in_threads(prepare, _fetched(pairs, work), threads)
    for number, (columns, busy) in enumerate(measured(own, prepare, threads, _device_done)):
        yield columns
        if busy is None:
            continue
        busy, found, rest = most(busy), find(), work[number + 1 + HANDOVER :]
        moves = busy >= BUSY and bool(found.nodes) and bool(rest)
        say(work[number].step, words(busy, threads, found, moves))
        if moves:
            yield from _handed_over(own, map(to_columns, _tables(PrepareActor, pairs, rest, 1, found.actors, **found.options)))
            return


def _handed_over(own: Generator[Columns, None, None], later: Iterator[Columns]) -> Iterator[Columns]:
    """HANDOVER batches of `own`, in whose time `later` starts, then those of `later`."""
    with ThreadPoolExecutor(1) as starter:
        first = starter.submit(next, later)
        yield from islice(own, HANDOVER)
        own.close()  # it has read ahead, and would go on with it
        yield first.result()
    yield from later


def _device_done() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _fetched(pairs: Pairs, work: Sequence[Work]) -> Iterator[pa.Table]:
    """One table of undecoded rows for each of `work`."""
    shards = pairs.fetch.manifest.shards
    rows = min(FETCHED_ROWS, FETCHED_BYTES * sum(s.samples for s in shards) // sum(s.bytes for s in shards))
    return _tables(FetchActor, pairs.fetch, work, max(1, rows // pairs.fetch.plan.batch), 1)


def _tables(actor: type[FetchActor], given: Any, work: Sequence[Work], together: int, actors: int, **where: Any) -> Iterator[pa.Table]:
    """One table for each of `work`; an item has `together` of them. where: options of Ray for the actors."""
    import ray
    from ray.data import ActorPoolStrategy

    set_up_data().execution_options.preserve_order = True
    begins = range(0, len(work), together)
    for begin in range(0, len(begins), SEGMENT):
        segment = [{"work": [vars(w) for w in work[i : i + together]]} for i in begins[begin : begin + SEGMENT]]
        # One block an item keeps items apart: several in one task would be merged into one output block.
        items = ray.data.from_items(segment, override_num_blocks=len(segment))
        tables = items.map_batches(
            actor,
            fn_constructor_args=(given,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=4),
            num_cpus=actor.CPUS,
            **where,
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


def in_threads(function: Callable[[A], B], items: Iterable[A], threads: int) -> Generator[B, None, None]:
    """`map(function, items)` by threads that work a little ahead of their reader."""
    waiting: deque[Future[B]] = deque()
    rest = iter(items)
    with ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:
        waiting.extend(pool.submit(function, item) for item in islice(rest, threads + 2))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield done
