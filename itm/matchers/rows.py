"""Rows of a table by number, with a backward pass that adds whole rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_add_(0, rows, grad), None


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] (n,...) of x (N,...), rows (n,) int64. The backward pass of `index_select` scatters number by number, ten times slower."""
    found: Tensor = _Rows.apply(x, rows)
    return found
