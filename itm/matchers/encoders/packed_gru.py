"""A layer of `nn.GRU` over packed rows on a CPU, with a backward pass written by hand.

That of torch unpacks every time step into a gradient as large as all of them and adds those up, and adds up the gradient of the weights
step by step; here a step costs its one product, and the weights' gradients are products over all steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from itm.matchers.rows import take


def serves(rnn: nn.GRU, words: Tensor) -> bool:
    """Whether `read_packed` computes what the module would, and with a gradient to gain from."""
    plain = rnn.num_layers == 1 and rnn.bias and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return words.device.type == "cpu" and plain and torch.is_grad_enabled()


def read_packed(rnn: nn.GRU, words: Tensor, lengths: Tensor) -> Tensor:
    """(N,L,D), lengths (N,) int64 -> (N,L,hidden of all directions), zero behind the lengths: one layer, zero initial state."""
    longest_first, order = lengths.sort(descending=True)
    sizes = [int((longest_first > k).sum()) for k in range(int(longest_first[0]))]
    places = torch.cat([order[:n] * words.shape[1] + k for k, n in enumerate(sizes)])
    x = take(words.flatten(0, 1), places)
    sides = ("", "_reverse") if rnn.bidirectional else ("",)
    weights = [[getattr(rnn, f"{name}_l0{side}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")] for side in sides]
    states = torch.cat([_Direction.apply(x, _steps(sizes, bool(side)), *own) for side, own in zip(sides, weights, strict=True)], 1)
    return states.new_zeros(len(words) * words.shape[1], states.shape[1]).index_copy(0, places, states).view(*words.shape[:2], -1)


def _steps(sizes: list[int], backwards: bool) -> list[tuple[int, slice]]:
    """(rows, where they lie) of each time step, in the order of reading."""
    found, start = [], 0
    for n in sizes:
        found.append((n, slice(start, start + n)))
        start += n
    return found[::-1] if backwards else found


class _Direction(torch.autograd.Function):
    """r = sig(x_r + h_r), z = sig(x_z + h_z), n = tanh(x_n + r h_n), h' = n + z (h - n), x_. = W_ih x + b_ih, h_. = W_hh h + b_hh.

    x (M,D): rows of all steps, step by step, the longest captions first; steps in the order of reading -> states (M,H).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: list[tuple[int, slice]], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
        width = w_hh.shape[1]
        gates = torch.addmm(b_ih, x, w_ih.T)
        before, hidden, states = (x.new_empty(len(x), width) for _ in range(3))
        h = x.new_zeros(max(n for n, _ in steps), width)
        for n, rows in steps:
            own, now = gates[rows], h[:n]
            before[rows] = now
            given = torch.addmm(b_hh, now, w_hh.T)
            own[:, : 2 * width].add_(given[:, : 2 * width]).sigmoid_()
            hidden[rows] = given[:, 2 * width :]
            new = own[:, 2 * width :].addcmul_(own[:, :width], hidden[rows]).tanh_()
            torch.lerp(new, now, own[:, width : 2 * width], out=states[rows])
            now.copy_(states[rows])
        ctx.steps = steps
        ctx.save_for_backward(x, w_ih, w_hh, gates, hidden, before)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w_ih, w_hh, gates, hidden, before = ctx.saved_tensors
        width = w_hh.shape[1]
        r, z, new = gates.split(width, 1)
        to_r, to_z, to_new = hidden * r * (1 - r), (before - new) * z * (1 - z), (1 - z) * (1 - new * new)
        slopes = x.new_empty(len(x), 4 * width)  # of x_r and h_r, x_z and h_z, x_n, h_n
        dh = x.new_zeros(max(n for n, _ in ctx.steps), width)
        for n, rows in reversed(ctx.steps):
            now, own = dh[:n].add_(grad[rows]), slopes[rows]
            to_x = torch.mul(now, to_new[rows], out=own[:, 2 * width : 3 * width])
            torch.mul(to_x, to_r[rows], out=own[:, :width])
            torch.mul(now, to_z[rows], out=own[:, width : 2 * width])
            to_h = torch.mul(to_x, r[rows], out=own[:, 3 * width :])
            now.mul_(z[rows]).addmm_(own[:, : 2 * width], w_hh[: 2 * width]).addmm_(to_h, w_hh[2 * width :])
        read, gated, last = slopes[:, : 3 * width], slopes[:, : 2 * width], slopes[:, 3 * width :]
        to_w_hh = torch.cat([gated.T @ before, last.T @ before])
        to_b_hh = torch.cat([gated.sum(0), last.sum(0)])
        to_inputs = read @ w_ih if ctx.needs_input_grad[0] else None
        return to_inputs, None, read.T @ x, to_w_hh, read.sum(0), to_b_hh
