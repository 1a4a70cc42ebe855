"""The GRU whose backward pass is written by hand: states and gradients of torch's own over packed captions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from itm.matchers.encoders.packed_gru import read_packed, serves
from itm.matchers.encoders.towers import read_words

LENGTHS = torch.tensor([3, 7, 1, 7, 2])


def of_torch(rnn: nn.GRU, words: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=words.shape[1])[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_states_and_gradients_are_those_of_torch(bidirectional: bool, dtype: torch.dtype, tolerance: float):
    rnn = nn.GRU(3, 5, bidirectional=bidirectional, batch_first=True).to(dtype)
    weight = torch.randn(5, 9, 5 * (1 + bidirectional), dtype=dtype)
    found = []
    for read in (of_torch, read_packed):
        words = torch.linspace(-2, 2, 5 * 9 * 3, dtype=dtype).view(5, 9, 3).sin().requires_grad_()
        rnn.zero_grad()
        states = read(rnn, words, LENGTHS)
        (states * weight).sum().backward()
        assert words.grad is not None
        found.append({"states": states.detach(), "words": words.grad, **{n: p.grad.clone() for n, p in rnn.named_parameters()}})
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    assert not found[1]["states"][0, 3:].any()


@pytest.mark.parametrize("lengths", [[1], [4], [2, 2], [1, 3, 3]])
def test_its_gradient_is_that_of_finite_differences(lengths: list[int]):
    rnn = nn.GRU(2, 3, bidirectional=True, batch_first=True).double()
    words = torch.randn(len(lengths), 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, *_: read_packed(rnn, w, torch.tensor(lengths)), (words, *rnn.parameters()))


def test_it_reads_one_layer_on_a_cpu_where_a_gradient_is_wanted():
    words = torch.randn(2, 3, 2)
    assert serves(nn.GRU(2, 3), words)
    assert not serves(nn.GRU(2, 3, num_layers=2), words)
    assert not serves(nn.GRU(2, 3, bias=False), words)
    assert not serves(nn.GRU(2, 3), words.to("meta"))
    with torch.no_grad():
        assert not serves(nn.GRU(2, 3), words)
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(nn.GRU(2, 3), words)


def test_frozen_words_and_two_layers_are_read_as_well():
    lengths = torch.tensor([2, 3])
    for layers in (1, 2):
        rnn = nn.GRU(2, 3, layers, bidirectional=True, batch_first=True).double()
        words = torch.randn(2, 3, 2, dtype=torch.float64)
        torch.testing.assert_close(read_words(rnn, words, lengths), of_torch(rnn, words, lengths), atol=1e-13, rtol=0)
