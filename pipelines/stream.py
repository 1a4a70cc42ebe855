"""Ray Data executes a plan: work items -> preprocessing actors -> Arrow blocks of exactly one per-rank batch, in planned order.

A work item is three numbers (step, micro-step, rank): the actor knows the plan, a pure function, and reads the byte ranges that
it names. Each Ray Train worker streams its own items from its checkpoint's position on, so restarting a worker group,
with as many or fewer workers, neither loses nor repeats a pair; no shuffle service, no split coordinator, no join.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa

from itm.data.pairs import Pairs, Work

SEGMENT = 2048
"""Work items per Ray Data execution: bounds the driver's bookkeeping in runs of a million steps."""


class Prepare:
    """The preprocessing actor: holds the plan, the tokenizer, shard indexes and open sidecars."""

    def __init__(self, pairs: Pairs) -> None:
        import torch

        torch.set_num_threads(1)
        self.pairs = pairs

    def __call__(self, items: pa.Table) -> pa.Table:
        """The batch of one work item. An error for the user comes back as rows: raised here, it would reach him buried in Ray's own."""
        (item,) = items.to_pylist()
        try:
            return self.pairs(Work(**item))
        except (OSError, ValueError) as error:
            return pa.table({"error": [str(error)] * self.pairs.plan.batch})


def work_of(rank: int, first: int, last: int, accumulate: int) -> list[Work]:
    """The items of one rank for steps [first, last)."""
    return [Work(step, micro, rank) for step in range(first, last) for micro in range(accumulate)]


def stream(pairs: Pairs, work: Sequence[Work], actors: int) -> Iterator[pa.Table]:
    """Tables of `work`, in its order, through Ray Data. Raises ValueError as `Pairs` does."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for begin in range(0, len(work), SEGMENT):
        segment = [vars(w) for w in work[begin : begin + SEGMENT]]
        # One block an item keeps items apart: several in one task would be merged into one output block.
        items = ray.data.from_items(segment, override_num_blocks=len(segment))
        tables = items.map_batches(
            Prepare,
            fn_constructor_args=(pairs,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=4),
            # A fraction: whole CPUs held by actors would starve the trainers of a small machine, and wait for them for ever.
            num_cpus=0.25,
        )
        blocks: Any = tables.iter_batches(batch_size=pairs.plan.batch, batch_format="pyarrow", prefetch_batches=2)
        for table in blocks:
            if "error" in table.column_names:
                raise ValueError(table["error"][0].as_py())
            yield table


def stream_here(pairs: Pairs, work: Sequence[Work], threads: int) -> Iterator[pa.Table]:
    """The same tables in the same order, prepared by threads of this process."""
    waiting: deque[Future[pa.Table]] = deque()
    items = iter(work)
    with ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:
        waiting.extend(pool.submit(pairs, item) for item in islice(items, threads + 2))
        while waiting:
            table = waiting.popleft().result()
            waiting.extend(pool.submit(pairs, item) for item in islice(items, 1))
            yield table
