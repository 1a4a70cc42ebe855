"""SGR and SAF scores with gradient: images against a chunk of captions, or chosen pairs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itm.matchers.late.base import attended_norm, gram, raw_scores
from itm.matchers.late.pairs import PairRows
from itm.matchers.late.sgraf_nodes import unit_nodes
from itm.matchers.late.sgraf_tiles import LAMBDA
from itm.matchers.norms import EPS, full, l2


class Judge(Protocol):
    """What is used of SGR and SAF."""

    sim_tranloc_w: nn.Linear
    sim_tranglo_w: nn.Linear
    sim_eval_w: nn.Linear

    def reason(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]: ...


def block_scores(judge: Judge, images: tuple[Tensor, ...], captions: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """All images against one chunk of captions, each as (parts, mask, global vectors): (I,T) and statistics (T,2).

    Equations: docs/methods/sgraf.md#similarity-vectors.
    """
    (parts, mask, whole), (words, word_mask, whole_words) = images, captions
    weights = unit_weights(raw_scores(words, parts), mask, gram(parts))
    if packs(parts):
        own = word_mask.flatten().nonzero().squeeze(1)
        chosen = weights.flatten(1, 2).index_select(1, own), parts, words.flatten(0, 1).index_select(0, own)
        glob = l2(judge.sim_tranglo_w((whole[:, None] - whole_words[None]).square()))
        return concluded(judge, unit_nodes(*chosen, judge.sim_tranloc_w, word_mask, glob), word_mask)
    attended = (weights.flatten(1, 2) @ parts).view(len(parts), *words.shape)
    return judged(judge, attended - words, whole[:, None] - whole_words[None], word_mask)


def chosen_scores(judge: Judge, whole_images: Tensor, whole_captions: Tensor, grams: Tensor, pairs: PairRows) -> Tensor:
    """(n,). The first three of all rows."""
    weights = unit_weights(pairs.raw, pairs.region_mask, grams.index_select(0, pairs.image)).squeeze(1)
    local = weights @ pairs.regions - pairs.words
    glob = whole_images.index_select(0, pairs.image) - whole_captions.index_select(0, pairs.caption)
    return judged(judge, local[:, None], glob[:, None], pairs.word_mask[:, None])[0].squeeze(1)


def packs(parts: Tensor) -> bool:
    """Whether the hand-written backward pass serves: on a CPU, where a loop over tiles costs nothing, in the type of the parts."""
    return parts.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def judged(judge: Judge, local: Tensor, glob: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of words (I,T,L,D) and of whole pairs (I,T,D), mask (T,L) or (I,T,L): (I,T) and statistics (T,2)."""
    local, glob = l2(judge.sim_tranloc_w(local.square())), l2(judge.sim_tranglo_w(glob.square()))
    return concluded(judge, torch.cat([glob.unsqueeze(2), local], 2), word_mask)


def concluded(judge: Judge, nodes: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes (I,T,1+L,S), the global one first: (I,T) and statistics (T,2)."""
    vectors, statistics = judge.reason(nodes, F.pad(word_mask, (1, 0), value=True))
    with torch.autocast(vectors.device.type, enabled=False):  # a bfloat16 score has 8 bits: many pairs would tie
        return judge.sim_eval_w(full(vectors)).squeeze(-1).sigmoid(), statistics


def attend(raw: Tensor, mask: Tensor) -> Tensor:
    """(I,T,L,R) attention of each word to the regions (docs/methods/sgraf.md#text-to-image-attention) of raw scores; mask (I,R)."""
    attention = l2(F.leaky_relu(raw, 0.1), dim=2)
    return (LAMBDA * attention).masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)


def unit_weights(raw: Tensor, mask: Tensor, grams: Tensor) -> Tensor:
    """The same such that weights @ regions are unit vectors; grams (I,R,R)."""
    weights = attend(raw, mask)
    return weights / (attended_norm(weights, grams).unsqueeze(-1) + EPS)
