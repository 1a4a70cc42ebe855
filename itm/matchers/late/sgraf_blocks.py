"""How SGR and SAF score with gradient: the attention of words to regions, similarity vectors of all pairs, scores of chosen ones."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itm.matchers.late.base import attended_norm
from itm.matchers.late.pairs import PairRows
from itm.matchers.late.sgraf_nodes import unit_nodes
from itm.matchers.late.sgraf_tiles import LAMBDA
from itm.matchers.norms import EPS, l2


class Reader(Protocol):
    """What is used of SGR."""

    sim_tranloc_w: nn.Linear
    sim_tranglo_w: nn.Linear

    def read(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]: ...


def chosen_scores(matcher: Reader, whole_images: Tensor, whole_captions: Tensor, grams: Tensor, pairs: PairRows) -> Tensor:
    """(n,). Global vectors (I,D), (T,D) and grams (I,R,R) of all rows."""
    weights = unit_weights(pairs.raw, pairs.region_mask, grams.index_select(0, pairs.image)).squeeze(1)
    local = weights @ pairs.regions - pairs.words
    glob = whole_images.index_select(0, pairs.image) - whole_captions.index_select(0, pairs.caption)
    nodes = torch.cat([l2(matcher.sim_tranglo_w(glob.square())).unsqueeze(1), l2(matcher.sim_tranloc_w(local.square()))], 1)
    return matcher.read(nodes.unsqueeze(1), F.pad(pairs.word_mask, (1, 0), value=True).unsqueeze(1))[0].squeeze(1)


def packs(parts: Tensor) -> bool:
    """Whether the hand-written backward pass serves: on a CPU, where a loop over tiles costs nothing, in the type of the parts."""
    return parts.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def packed_nodes(weights: Tensor, parts: Tensor, words: Tensor, mask: Tensor, layer: nn.Linear, glob: Tensor) -> Tensor:
    """(I,T,1+L,S): `unit_nodes` of padded weights (I,T,L,R) and words (T,L,D), with the global ones (I,T,S) first."""
    own = mask.flatten().nonzero().squeeze(1)
    chosen = weights.flatten(1, 2).index_select(1, own), parts, words.flatten(0, 1).index_select(0, own)
    return unit_nodes(*chosen, layer, mask, glob)


def attend(raw: Tensor, mask: Tensor) -> Tensor:
    """(I,T,L,R) attention of each word to the regions (docs/methods/sgraf.md#text-to-image-attention) of raw scores; mask (I,R)."""
    attention = l2(F.leaky_relu(raw, 0.1), dim=2)
    return (LAMBDA * attention).masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)


def unit_weights(raw: Tensor, mask: Tensor, grams: Tensor) -> Tensor:
    """The same such that weights @ regions are unit vectors; grams (I,R,R)."""
    weights = attend(raw, mask)
    return weights / (attended_norm(weights, grams).unsqueeze(-1) + EPS)
