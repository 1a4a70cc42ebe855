"""Generalised pooling (GPO) of VSE-infinity: how much the largest, the second largest, ... value of each dimension counts is learned.

Equations: docs/methods/dual.md#generalised-pooling. Chen et al., CVPR 2021, arXiv 2011.04305.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from itm.matchers.encoders.poolings import Pooling


class GPO(Pooling):
    """parts (N,K,D) and mask (N,K) bool -> (N,D): the values of each dimension sorted, weighted by rank.

    The weights depend on nothing but the number of parts: a bidirectional GRU reads the positions, and a softmax over the ranks that there
    are makes its answers weights. positions: width of their encoding, even; hidden: of the GRU; temperature: of the softmax.
    """

    def __init__(self, *, positions: int = 32, hidden: int = 32, temperature: float = 0.1) -> None:
        """Raises ValueError for an odd width of positions."""
        super().__init__()
        if positions % 2:
            raise ValueError(f"pooling gpo: positions is {positions}; sine and cosine need an even width")
        self.positions, self.temperature = positions, temperature
        self.gru = nn.GRU(positions, hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(hidden, 1, bias=False)

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        counts = mask.sum(1)
        # A rank that does not exist sorts last, and counts nothing there.
        ranked = parts.masked_fill(~mask.unsqueeze(-1), -torch.inf).sort(dim=1, descending=True).values
        exists = torch.arange(parts.shape[1], device=parts.device) < counts[:, None]
        return (ranked.masked_fill(~exists.unsqueeze(-1), 0.0) * self.weights(counts, parts.shape[1]).unsqueeze(-1)).sum(1)

    def weights(self, counts: Tensor, longest: int) -> Tensor:
        """(N,longest): row n sums to 1 over its first counts[n] ranks. counts (N,) int64, none above `longest`."""
        lengths, row = counts.clamp_min(1).unique(return_inverse=True)
        codes = sinusoids(longest, self.positions, self.linear.weight).expand(len(lengths), -1, -1)
        packed = pack_padded_sequence(codes, lengths.cpu(), batch_first=True, enforce_sorted=False)
        read, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=longest)
        answers = self.linear((read[..., : self.gru.hidden_size] + read[..., self.gru.hidden_size :]) / 2).squeeze(-1)
        absent = torch.arange(longest, device=counts.device) >= lengths[:, None]
        return (answers / self.temperature).masked_fill(absent, -torch.inf).softmax(dim=1)[row]


def sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """(length,width) on the device and in the dtype of `like`: sin and cos of position / 10000^(2j/width), side by side."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=like.device) / width)
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(like.dtype)
