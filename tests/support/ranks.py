"""Ranks of a process group as processes of this machine, on a port that was free a moment ago."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist
from torch.multiprocessing import spawn

from tests.support.ports import free_ports


def spawn_ranks(worker: Callable[..., None], ranks: int, *given: object) -> None:
    """Run `worker(rank, port, *given)` in `ranks` processes; `joined(rank, port, ranks)` is for its inside."""
    spawn(worker, (*free_ports(1), *given), nprocs=ranks)


@contextmanager
def joined(rank: int, port: int, ranks: int) -> Iterator[None]:
    """Inside, one thread and the group; in the end the ranks wait for each other, so that none leaves while another still talks to it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    yield
    dist.barrier()
    dist.destroy_process_group()
