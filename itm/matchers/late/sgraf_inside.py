"""What SGR and SAF do inside with one pair: the gates of SAF's nodes and the edges of SGR's graph, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from itm.matchers.late.base import parts_of
from itm.matchers.late.sgraf import SAF, SGR, SGRAF, GraphReasoning, SimilarityMatcher
from itm.types import Encoded


@torch.no_grad()
def gates(matcher: SAF | SGRAF, image: Encoded, caption: Encoded) -> Tensor:
    """(1+L,) the share of the whole pair, first, and of each token in SAF's sum, as in evaluation; they sum to 1, padding has 0."""
    nodes, mask = _nodes(matcher, image, caption)
    module = matcher.SAF_module
    assert module.bn.running_mean is not None
    assert module.bn.running_var is not None
    return module.opened(module.attn_sim_w(nodes).squeeze(-1), module.bn.running_mean, module.bn.running_var, mask)[0, 0]


@torch.no_grad()
def edges(matcher: SGR | SGRAF, image: Encoded, caption: Encoded) -> list[Tensor]:
    """One (A,1+L) a step: what node a takes of each node, a row sums to 1. Node 0 is the whole pair; the last step has its row alone."""
    nodes, mask = _nodes(matcher, image, caption)
    z, found = nodes[0], []
    for number, step in enumerate(matcher.SGR_module):
        assert isinstance(step, GraphReasoning)
        last = number == len(matcher.SGR_module) - 1
        found.append(step.edges(z[:, :1] if last else z, z, mask)[0])
        z = step(z, mask, last=last)
    return found


def _nodes(matcher: SimilarityMatcher, image: Encoded, caption: Encoded) -> tuple[Tensor, Tensor]:
    """(1,1,1+L,S) and the mask (1,1+L) of one image and one caption."""
    sides = [(*parts_of(rows), matcher.whole(rows, side)) for rows, side in ((image, "image"), (caption, "text"))]
    return matcher.nodes(*sides), matcher.node_mask(sides[1][1])
