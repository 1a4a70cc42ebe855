"""The published scoring loops of SCAN, SGRAF and NAAF, and a half step of IAIS on UNITER, written plainly: the peers of
`itm.benchmarks.scoring` and of the training benches, and oracles of their numbers.

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


def iais_half(matcher: Any, pool: dict[str, Tensor], anchor: str, keep: int, margin: float = 0.2) -> tuple[Tensor, Tensor]:
    """(ranking, alignment) of the half step of IAIS on a pool whose row 0 is the positive; anchor V: one image, L: one caption.

    pool: tokens (P,L), word_mask (P,L), regions (P,R,D), boxes (P,R,7), region_mask (P,R), the one side repeated P times. All pairs of the
    pool in one padded forward pass of evaluation, then the positive and its `keep` hardest negatives in training; singular alignment.
    """
    training = matcher.training
    matcher.eval()
    with torch.no_grad():
        scores = _joint(matcher, pool)[0]
    matcher.train(training)
    hardest = torch.cat([torch.zeros(1, dtype=torch.long), scores[1:].topk(keep).indices + 1])
    scores, last = _joint(matcher, {name: rows[hardest] for name, rows in pool.items()})
    chances = scores.sigmoid()
    ranking = (margin + chances[1:] - chances[0]).clamp(min=0).mean()
    words, regions = int(pool["word_mask"][0].sum()) - 2, int(pool["region_mask"][0].sum())
    text, seen = slice(1, 1 + words), slice(pool["tokens"].shape[1], pool["tokens"].shape[1] + regions)
    attention = matcher.uniter.encoder.layer[-1].attention.self
    query, key = _heads(attention.query(last[:1]), matcher), _heads(attention.key(last[:1]), matcher)
    block = lambda asking, asked: ((query[:, :, asking] @ key[:, :, asked].mT) / query.shape[-1] ** 0.5).softmax(-1).mean(1)[0]
    own, other = (seen, text) if anchor == "V" else (text, seen)
    nearest = block(own, other).argmax(1)
    left, right = block(own, own), block(other, other)[nearest][:, nearest].softmax(-1)
    return ranking, ((left - right) * (left.log() - right.log())).sum() / len(left)


def _joint(matcher: Any, pool: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scores (P,) and the input (P,L+R,H) of the last layer, words first, each side padded to its longest."""
    body = matcher.uniter
    x = torch.cat([body.embeddings(input_ids=pool["tokens"]), body.img_embeddings(pool["regions"], pool["boxes"], body.embeddings)], 1)
    hidden = torch.where(torch.cat([pool["word_mask"], pool["region_mask"]], 1), 0.0, -10000.0)[:, None, None]
    last = x
    for layer in body.encoder.layer:
        last, attention, output = x, layer.attention.self, layer.attention.output
        query, key, value = (_heads(part(x), matcher) for part in (attention.query, attention.key, attention.value))
        weights = attention.dropout((query @ key.mT / query.shape[-1] ** 0.5 + hidden).softmax(-1))
        x = output.LayerNorm(output.dropout(output.dense((weights @ value).transpose(1, 2).flatten(2))) + x)
        inner = F.gelu(layer.intermediate.dense(x))
        x = layer.output.LayerNorm(layer.output.dropout(layer.output.dense(inner)) + x)
    return matcher.rank_output(body.pooler.dense(x[:, 0]).tanh()).squeeze(-1), last


def _heads(x: Tensor, matcher: Any) -> Tensor:
    return x.unflatten(-1, (matcher.uniter.encoder.layer[0].heads, -1)).transpose(1, 2)


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
