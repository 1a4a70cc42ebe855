"""Similarity vectors with a backward pass written by hand: those of autograd over the plain form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itm.matchers.late import sgraf_nodes
from itm.matchers.late.sgraf_nodes import unit_nodes
from itm.matchers.norms import l2

MASK = torch.tensor([[True, True, True], [True, True, False]])
WORDS = 5


def world(dtype: torch.dtype = torch.float64, images: int = 3) -> list[Tensor]:
    """Weights (I,N,R), regions (I,R,D), words (N,D)."""
    shapes = (images, WORDS, 2), (images, 2, 4), (WORDS, 4)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def plain(weights: Tensor, regions: Tensor, words: Tensor, layer: nn.Linear, glob: Tensor) -> Tensor:
    unit = l2(layer((weights @ regions - words).square()))
    nodes = torch.zeros(len(weights), 2, 4, unit.shape[2], dtype=unit.dtype)
    nodes[:, 0, 1:], nodes[:, 1, 1:3] = unit[:, :3], unit[:, 3:]
    nodes[:, :, 0] = glob
    return nodes


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_vectors_and_gradients_are_those_of_autograd(dtype: torch.dtype, tolerance: float, rows: int, monkeypatch: Any):
    monkeypatch.setattr(sgraf_nodes, "ROWS", rows)
    layer, given = nn.Linear(4, 3).to(dtype), world(dtype)
    glob = torch.randn(3, 2, 3, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 2, 4, 3, dtype=dtype)
    found = []
    for nodes in (plain(*given, layer, glob), unit_nodes(*given, layer, MASK, glob)):
        found.append((nodes, *torch.autograd.grad((nodes * weight).sum(), [*given, glob, *layer.parameters()])))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_the_gradient_is_that_of_finite_differences():
    layer = nn.Linear(4, 3).double()
    glob = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    given = [*world(images=2), glob, *layer.parameters()]
    assert torch.autograd.gradcheck(lambda w, v, c, g, *_: unit_nodes(w, v, c, layer, MASK, g), given)


def test_a_vector_of_length_zero_has_the_gradient_of_the_plain_form():
    layer = nn.Linear(4, 3).double()
    nn.init.zeros_(layer.bias)
    weights, regions, words = world(images=1)
    words = (weights @ regions)[0].detach().clone().requires_grad_()  # no difference at all
    glob = torch.zeros(1, 2, 3, dtype=torch.float64)
    for nodes in (plain(weights, regions, words, layer, glob), unit_nodes(weights, regions, words, layer, MASK, glob)):
        assert not nodes.any()
        (slope,) = torch.autograd.grad(nodes.sum(), layer.bias)
        torch.testing.assert_close(slope, torch.full((3,), WORDS / 1e-8, dtype=torch.float64))
