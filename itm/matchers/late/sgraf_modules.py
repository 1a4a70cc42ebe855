"""The layers of SGR and SAF, as in the authors' code, module names included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from itm.matchers.late.sgraf_tiles import linear
from itm.matchers.late.tiles import product
from itm.matchers.norms import full, l1, l2, masked_mean, xavier


class SlotNorm(nn.BatchNorm1d):
    """Batch norm over the region slot: channel = position of the region, statistics over images and width together.

    Equations: docs/methods/sgraf.md#region-slot-norm.

    Padded regions are left out of the statistics; a slot that no image of the batch fills keeps its running values.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (N,R,D), mask (N,R) bool."""
        if mask is None or not self.training or bool(mask.all()):
            return super().forward(x)
        real = mask.unsqueeze(-1)
        count = (mask.sum(0) * x.shape[2])[:, None].clamp(min=1)
        mean = (x * real).sum((0, 2), keepdim=True)[0] / count
        variance = ((x - mean).square() * real).sum((0, 2), keepdim=True)[0] / count
        self._track(mask.any(0), mean.squeeze(1), (variance * count / (count - 1).clamp(min=1)).squeeze(1))
        return (x - mean) / (variance + self.eps).sqrt() * self.weight[:, None] + self.bias[:, None]

    @torch.no_grad()
    def _track(self, filled: Tensor, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        step = filled * (self.momentum or 0.0)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step.to(self.running_mean.dtype))
        self.running_var.lerp_(variance.to(self.running_var.dtype), step.to(self.running_var.dtype))
        self.num_batches_tracked += 1


class ImageGlobal(nn.Module):
    """v_global_w: one unit vector an image, the regions weighted by their agreement with the mean region.

    Equations: docs/methods/sgraf.md#global-vectors.
    """

    def __init__(self, width: int, regions: int, dropout: float) -> None:
        super().__init__()
        self.embedding_local = nn.Sequential(xavier(width, width), SlotNorm(regions), nn.Tanh(), nn.Dropout(dropout))
        self.embedding_global = nn.Sequential(xavier(width, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(dropout))
        self.embedding_common = nn.Sequential(xavier(width, 1))

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        linear, norm, tanh, dropout = self.embedding_local
        local = dropout(tanh(norm(linear(parts), mask)))
        whole = self.embedding_global(masked_mean(parts, mask))
        return _weighted(self.embedding_common(local * whole.unsqueeze(1)).squeeze(-1), parts, mask)


class TextGlobal(nn.Module):
    """t_global_w: the same for words, without batch norm; start and end count as words."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding_local = nn.Sequential(xavier(width, width), nn.Tanh(), nn.Dropout(dropout))
        self.embedding_global = nn.Sequential(xavier(width, width), nn.Tanh(), nn.Dropout(dropout))
        self.embedding_common = nn.Sequential(xavier(width, 1))

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        whole = self.embedding_global(masked_mean(parts, mask))
        return _weighted(self.embedding_common(self.embedding_local(parts) * whole.unsqueeze(1)).squeeze(-1), parts, mask)


def _weighted(logits: Tensor, parts: Tensor, mask: Tensor) -> Tensor:
    weights = full(logits).masked_fill(~mask, -torch.inf).softmax(-1)
    return l2((weights.unsqueeze(1) @ parts).squeeze(1))


class GraphReasoning(nn.Module):
    """One SGR step: Z <- relu(Lin(softmax(q(Z) k(Z)') Z)), dense graph with self edges, no scaling, no residual.

    Equations: docs/methods/sgraf.md#similarity-graph-reasoning.
    """

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.graph_query_w, self.graph_key_w, self.sim_graph_w = (xavier(sim_dim, sim_dim) for _ in range(3))

    def forward(self, nodes: Tensor, mask: Tensor, last: bool) -> Tensor:
        """nodes (P,K,S), mask (P,K). The last step needs node 0 only."""
        return self.sim_graph_w(self.edges(nodes[:, :1] if last else nodes, nodes, mask) @ nodes).relu()

    def edges(self, asking: Tensor, nodes: Tensor, mask: Tensor) -> Tensor:
        """(P,A,K) what each of the nodes `asking` (P,A,S) takes of each node; a row sums to 1."""
        logits = F.linear(asking, *self._joined()) @ nodes.transpose(1, 2)
        return full(logits).masked_fill(~mask[:, None], -torch.inf).softmax(-1)

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Query and key layer as one: terms constant in a row vanish in the softmax, so the gradient of the key bias is 0, and said to be.

        Item 6 of docs/methods/sgraf.md#exact-transformations.
        """
        query, key = self.graph_query_w, self.graph_key_w
        return key.weight.T @ query.weight, query.bias @ key.weight + 0.0 * key.bias

    def unmasked(self, nodes: Tensor, last: bool) -> Tensor:
        """The same without gradient, for nodes (P,K,S) that are all real, in their type."""
        asking = nodes[:, :1] if last else nodes
        weight, bias = self._joined()
        queries = product(asking.flatten(0, 1), weight.to(nodes.dtype), bias.to(nodes.dtype)).view_as(asking)
        mixed = (queries @ nodes.mT).softmax(-1) @ nodes
        return linear(mixed.flatten(0, 1), self.sim_graph_w).relu_().view_as(asking)


def _with_logits(nodes: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """(...,S) -> layer(nodes) (...) and the nodes to go on with, whose gradient both share."""
    if torch.is_autocast_enabled(nodes.device.type):
        return layer(nodes).squeeze(-1), nodes
    found: tuple[Tensor, Tensor] = _Logits.apply(nodes, layer.weight, layer.bias)
    return found


class _Logits(torch.autograd.Function):
    """Adds the gradient of the logits into that of the nodes, which is as large as all nodes: autograd would make and add a second one."""

    @staticmethod
    def forward(ctx: Any, nodes: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(nodes, weight)
        return F.linear(nodes, weight, bias).squeeze(-1), nodes.view_as(nodes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_logits: Tensor, to_nodes: Tensor) -> Any:
        nodes, weight = ctx.saved_tensors
        to_weight = to_logits.flatten()[None] @ nodes.flatten(0, -2)
        # In place: it is the fresh result of the one product that reads the nodes, held by nobody else.
        return to_nodes.addcmul_(to_logits.unsqueeze(-1), weight[0]), to_weight, to_logits.sum()[None]


class AttentionFiltration(nn.Module):
    """SAF: sum of the nodes weighted by l1(sigmoid(BN(Lin(Z)))), then l2.

    Equations: docs/methods/sgraf.md#similarity-attention-filtration.
    """

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.attn_sim_w = xavier(sim_dim, 1)
        self.bn = nn.BatchNorm1d(1)

    def forward(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """nodes (I,T,K,S), mask (T,K) -> vectors (I,T,S) and, in training, mean and unbiased variance a caption (T,2).

        In training a caption is normalised by its own values over all images of the block
        (docs/methods/sgraf.md#batch-norm-in-training).
        """
        logits, nodes = _with_logits(nodes, self.attn_sim_w)
        norm = self.bn
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance, statistics = norm.running_mean, norm.running_var, logits.new_zeros(len(mask), 2)
        if self.training:
            count = len(nodes) * mask.sum(1)
            mean = (logits * mask).sum((0, 2)) / count
            variance = ((logits - mean[:, None]).square() * mask).sum((0, 2)) / count
            statistics = torch.stack([mean, variance * count / (count - 1).clamp(min=1)], 1).detach()
            mean, variance = mean[:, None], variance[:, None]
        return l2((self.opened(logits, mean, variance, mask).unsqueeze(-2) @ nodes).squeeze(-2)), statistics

    def opened(self, logits: Tensor, mean: Tensor, variance: Tensor, mask: Tensor) -> Tensor:
        """(I,T,K) the gates of nodes with these logits, each the node's share in the sum."""
        norm = self.bn
        return l1(((logits - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias).sigmoid() * mask)

    def unmasked(self, nodes: Tensor) -> Tensor:
        """nodes (P,K,S), all real, in evaluation without gradient -> (P,S) at least float32."""
        norm = self.bn
        assert norm.running_mean is not None
        assert norm.running_var is not None
        logits = (nodes @ self.attn_sim_w.weight[0].to(nodes.dtype) + self.attn_sim_w.bias).to(norm.weight.dtype)
        gates = ((logits - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias).sigmoid()
        return l2((l1(gates).to(nodes.dtype).unsqueeze(1) @ nodes).squeeze(1).to(norm.weight.dtype))

    @torch.no_grad()
    def track(self, statistics: Tensor) -> None:
        """One momentum update a caption, in order, in closed form: run <- (1-m)^M run + sum_j m (1-m)^(M-1-j) stat_j.

        Why: docs/methods/sgraf.md#batch-norm-in-training.
        """
        norm, captions = self.bn, len(statistics)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        momentum = norm.momentum or 0.0
        ages = torch.arange(captions - 1, -1, -1, device=statistics.device, dtype=statistics.dtype)
        added = (momentum * (1 - momentum) ** ages) @ statistics
        for running, share in zip((norm.running_mean, norm.running_var), added, strict=True):
            running.mul_((1 - momentum) ** captions).add_(share.to(running.dtype))
        norm.num_batches_tracked += captions


def graph_reasoned(steps: nn.ModuleList, nodes: Tensor, mask: Tensor, whole: bool = True) -> Tensor:
    """nodes (I,T,K,S), mask (T,K) or (I,T,K) -> (I,T,S) after the steps: the first node, of the whole pair; without one their mean."""
    images, captions = nodes.shape[:2]
    z, real = nodes.flatten(0, 1), mask.expand(nodes.shape[:3]).flatten(0, 1)
    for k, step in enumerate(steps):
        z = step(z, real, last=whole and k == len(steps) - 1)
    return (z[:, 0] if whole else masked_mean(z, real)).view(images, captions, -1)


def graph_reasoned_unmasked(steps: nn.ModuleList, nodes: Tensor) -> Tensor:
    """The same without gradient, for nodes (P,K,S) that are all real, in their type -> (P,S)."""
    for k, step in enumerate(steps):
        assert isinstance(step, GraphReasoning)
        nodes = step.unmasked(nodes, last=k == len(steps) - 1)
    return nodes[:, 0]
