"""The published scoring loops of SCAN, SGRAF and NAAF written plainly: the peers of `itm.benchmarks.scoring` and oracles of its scores.

One caption at a time against all images, attended vectors materialised. Written from the equations; shares no code with `itm.matchers`
except the weights. regions (I,R,D) unit vectors, captions: a list of (L,D) unit vectors; any float type, any device. Returns (I,T).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-8


def scan_loop(regions: Tensor, captions: list[Tensor], direction: str, smooth: float) -> Tensor:
    """SCAN with clipped_l2norm and mean aggregation; direction t2i: words attend to regions, i2t: regions attend to words."""
    columns = []
    for words in captions:
        repeated = _repeat(words, regions)
        query, context = (repeated, regions) if direction == "t2i" else (regions, repeated)
        attended = _attend(query, context, smooth)
        norms = (query.norm(dim=2) * attended.norm(dim=2)).clamp(min=EPS)
        columns.append(((query * attended).sum(2) / norms).mean(1))
    return torch.stack(columns, 1)


def sgraf_loop(matcher: Any, regions: Tensor, captions: list[Tensor]) -> Tensor:
    """SGR or SAF, with the weights of `matcher` in evaluation mode."""
    whole = matcher.v_global_w(regions, regions.new_ones(regions.shape[:2], dtype=torch.bool))
    columns = []
    for words in captions:
        repeated = _repeat(words, regions)
        whole_words = matcher.t_global_w(words[None], words.new_ones(1, len(words), dtype=torch.bool)).expand(len(regions), -1)
        attended = _unit(_attend(repeated, regions, 9.0))
        local = _unit(matcher.sim_tranloc_w((attended - repeated).pow(2)))
        glob = _unit(matcher.sim_tranglo_w((whole - whole_words).pow(2)))
        nodes = torch.cat([glob.unsqueeze(1), local], 1)
        vector = _graph(matcher, nodes) if matcher.kind == "sgr" else _filtration(matcher.SAF_module, nodes)
        columns.append(matcher.sim_eval_w(vector).squeeze(-1).sigmoid())
    return torch.stack(columns, 1)


def naaf_loop(regions: Tensor, captions: list[Tensor], threshold: float, smooth: float) -> Tensor:
    """The positive feature branch of NAAF, which is UARDA's score: only regions above the threshold are attended to."""
    columns = []
    for words in captions:
        repeated = _repeat(words, regions)
        scores = repeated @ regions.transpose(1, 2)
        above = torch.where(scores > threshold, scores - threshold, -1e9)
        weights = torch.exp(smooth * above)
        weights = weights / (weights.sum(-1, keepdim=True) + EPS)
        attended = weights @ regions
        cosine = (repeated * attended).sum(2) / attended.norm(dim=2).clamp(min=EPS)
        columns.append(cosine.mean(1))
    return torch.stack(columns, 1)


def _repeat(words: Tensor, regions: Tensor) -> Tensor:
    return words[None].expand(len(regions), -1, -1).contiguous()


def _unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True).sqrt() + EPS)


def _attend(query: Tensor, context: Tensor, smooth: float) -> Tensor:
    """(I,Q,D): scores normalised over the query, softmax over the context."""
    attention = F.leaky_relu(context @ query.transpose(1, 2), 0.1)
    weights = (_unit(attention).transpose(1, 2).contiguous() * smooth).softmax(-1)
    return (context.transpose(1, 2) @ weights.transpose(1, 2).contiguous()).transpose(1, 2)


def _graph(matcher: Any, nodes: Tensor) -> Tensor:
    for step in matcher.SGR_module:
        edges = (step.graph_query_w(nodes) @ step.graph_key_w(nodes).transpose(1, 2)).softmax(-1)
        nodes = step.sim_graph_w(edges @ nodes).relu()
    return nodes[:, 0]


def _filtration(module: Any, nodes: Tensor) -> Tensor:
    gates = module.bn(module.attn_sim_w(nodes).transpose(1, 2)).transpose(1, 2).sigmoid()
    gates = gates / (gates.abs().sum(1, keepdim=True) + EPS)
    return _unit((gates.transpose(1, 2) @ nodes).squeeze(1))
