"""The word encoder of the SCAN family against a cell-by-cell walk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from itm.matchers.encoders.gru import WordGRU
from tests.support.late_worlds import captions_of


def walked(tower: WordGRU, words: list[int]) -> Tensor:
    """(L,width) of one caption, by the equations of a GRU cell, one word and one direction at a time."""

    def direction(order: list[int], suffix: str) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = (getattr(tower.rnn, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h, states = torch.zeros(tower.width), {}
        for place in order:
            x = tower.embed.weight[words[place]]
            (xr, xz, xn), (hr, hz, hn) = (w_ih @ x + b_ih).chunk(3), (w_hh @ h + b_hh).chunk(3)
            r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
            h = (1 - z) * torch.tanh(xn + r * hn) + z * h
            states[place] = h
        return torch.stack([states[place] for place in range(len(words))])

    places = list(range(len(words)))
    states = direction(places, "")
    return (states + direction(places[::-1], "_reverse")) / 2 if tower.rnn.bidirectional else states


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_words_equal_a_walk_over_the_cells_and_padding_is_zero(bidirectional: bool, normalize: bool):
    tower = WordGRU(vocab_size=20, word_dim=5, width=6, bidirectional=bidirectional, normalize=normalize)
    captions = captions_of([4, 1, 3], longest=6)
    encoded = tower(captions)
    for row, length in enumerate([4, 1, 3]):
        states = walked(tower, captions.tokens[row, :length].tolist())
        states = states / states.norm(dim=1, keepdim=True) if normalize else states
        torch.testing.assert_close(encoded.parts[row, :length], states, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(encoded.vector[row], states.mean(0), atol=1e-6, rtol=1e-5)
        assert not encoded.parts[row, length:].any()


def test_dropout_is_of_the_embeddings_and_only_in_training():
    tower = WordGRU(vocab_size=20, word_dim=5, width=6, dropout=0.9).train()
    captions = captions_of([5, 5])
    assert not torch.equal(tower(captions).parts, tower(captions).parts)
    tower.eval()
    assert torch.equal(tower(captions).parts, tower(captions).parts)


def test_the_options_rebuild_the_same_layers():
    tower = WordGRU(vocab_size=20, word_dim=4, width=6, layers=2, bidirectional=False, dropout=0.1, normalize=False)
    again = WordGRU(vocab_size=20, **tower.options)
    again.load_state_dict(tower.state_dict())
    captions = captions_of([3, 2])
    assert torch.equal(again.eval()(captions).parts, tower.eval()(captions).parts)
