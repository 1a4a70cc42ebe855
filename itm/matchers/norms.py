"""Norms as SCAN defines them, the mean of real parts, and the initialisation that the whole SCAN family shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-8


def guarded_norm(x: Tensor, dim: int = -1) -> Tensor:
    """sqrt(sum x^2), kept axis; the gradient at exactly zero is zero, where a plain root gives NaN (padding rows)."""
    return guarded_root(full(x).square().sum(dim, keepdim=True))


def full(x: Tensor) -> Tensor:
    """At least float32, whatever the autocast: products may be bfloat16, norms and softmax are not."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def guarded_root(square: Tensor) -> Tensor:
    """sqrt of values that rounding may have put below zero; value and gradient 0 at and below 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def l2(x: Tensor, dim: int = -1) -> Tensor:
    """x / (||x|| + 1e-8): epsilon outside the root (docs/methods/scan.md#norms), unlike `F.normalize`."""
    return x / (guarded_norm(x, dim) + EPS)


def l1(x: Tensor, dim: int = -1) -> Tensor:
    """x / (sum |x| + 1e-8)."""
    return x / (x.abs().sum(dim, keepdim=True) + EPS)


def masked_mean(parts: Tensor, mask: Tensor | None) -> Tensor:
    """(N,K,D), (N,K) bool -> (N,D): mean of the real parts; without a mask all are real."""
    if mask is None:
        return parts.mean(1)
    return parts.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def xavier(inside: int, outside: int) -> nn.Linear:
    """Linear layer with U(-a,a), a = sqrt(6 / (inside + outside)), and zero bias: the initialisation of the whole SCAN family."""
    linear = nn.Linear(inside, outside)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
