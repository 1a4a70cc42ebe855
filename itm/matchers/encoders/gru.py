"""Words of a caption through embedding and (bi-)GRU, as SCAN and SGRAF read them."""

from __future__ import annotations

from torch import nn

from itm.matchers.encoders.build import Encoder
from itm.matchers.encoders.towers import check_tokens, read_words
from itm.matchers.norms import l2, masked_mean
from itm.types import Captions, Encoded


class WordGRU(Encoder):
    """parts (N,L,width): embedding, dropout, packed GRU, mean of the two directions of the last layer, l2.

    Equations: docs/methods/scan.md#text-encoder.

    vector (N,width) = mean over the valid words, start and end included. normalize=False is `no_txtnorm`; SCAN has no dropout, SGRAF 0.4.
    """

    unit_parts = True

    def __init__(
        self,
        *,
        vocab_size: int,
        word_dim: int = 300,
        width: int = 1024,
        layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.options = dict(
            word_dim=word_dim, width=width, layers=layers, bidirectional=bidirectional, dropout=dropout, normalize=normalize
        )
        self.embed = nn.Embedding(vocab_size, word_dim)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.dropout = nn.Dropout(dropout)
        self.rnn = nn.GRU(word_dim, width, layers, batch_first=True, bidirectional=bidirectional)
        self.normalize = normalize
        self.width = self.vector_width = width

    def forward(self, captions: Captions) -> Encoded:
        """Raises ValueError as `check_tokens`."""
        check_tokens(captions, self.embed.num_embeddings)
        parts = read_words(self.rnn, self.dropout(self.embed(captions.tokens)), captions.host.mask.sum(1))
        if self.rnn.bidirectional:
            parts = parts.unflatten(2, (2, self.width)).mean(2)
        parts = l2(parts) if self.normalize else parts
        return Encoded(vector=masked_mean(parts, captions.mask), parts=parts, mask=captions.mask)
