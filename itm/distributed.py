"""Rank, world size and gathering over ranks. Everything works alone at world size 1, without a process group."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def _all_gather(x: Tensor) -> Tensor:
    gathered = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(gathered, x.contiguous())
    return torch.cat(gathered)


class _GatherRows(torch.autograd.Function):
    """All-gather forward; backward sums the incoming gradients over ranks and returns this rank's rows.

    Every rank evaluates the same global loss, so the sum is W times the local gradient and the mean that DDP takes over
    ranks restores the gradient of the one-process loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (W*B, ...), with gradient to every rank. Each rank must hold equally many rows."""
    if world_size() == 1:
        return x
    return _GatherRows.apply(x) if x.is_floating_point() else _all_gather(x)


def gather_ragged_rows(x: Tensor) -> Tensor:
    """As `gather_rows`, for (B, K, ...) whose second axis differs between ranks: zero-padded to the longest first."""
    if world_size() == 1:
        return x
    longest = all_reduce_max(torch.tensor(x.shape[1], device=x.device))
    pad = x.new_zeros(x.shape[0], int(longest) - x.shape[1], *x.shape[2:])
    return gather_rows(torch.cat([x, pad], 1))


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, without gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_max(x: Tensor) -> Tensor:
    """The largest over ranks, without gradient."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Those of rank 0 to all ranks, in place; one message a type."""
    if world_size() == 1:
        return
    for _, group in itertools.groupby(sorted(tensors, key=lambda t: str(t.dtype)), key=lambda t: t.dtype):
        same = list(group)
        flat = torch.cat([t.flatten() for t in same])
        dist.broadcast(flat, 0)
        for tensor, values in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(values.view_as(tensor))
