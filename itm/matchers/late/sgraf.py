"""SGR and SAF (Diao et al., AAAI 2021): similarity vectors of words and of the whole pair, reasoned over or filtered.

As in the authors' code, module names included, with the exact transformations of
docs/methods/sgraf.md#exact-transformations: captions are scored in chunks of like length against all images of the block, masked where
padded. SGRAF is the mean of the scores of one SGR and one SAF:
`score_matrix([sgr, saf], ...)`.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from itm.matchers.late.base import LateInteraction, gram, parts_of, raw_scores
from itm.matchers.late.pairs import like_length, score_pairs
from itm.matchers.late.sgraf_blocks import attend, block_scores, chosen_scores, packs
from itm.matchers.late.sgraf_tiles import linear, tiled_scores
from itm.matchers.late.tiles import can_tile, product
from itm.matchers.norms import full, l1, l2, masked_mean, xavier
from itm.types import Encoded, Images, Options, SplitScore


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
        asking = nodes[:, :1] if last else nodes
        edges = F.linear(asking, *self._joined()) @ nodes.transpose(1, 2)
        weights = full(edges).masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return self.sim_graph_w(weights @ nodes).relu()

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
        logits, norm = self.attn_sim_w(nodes).squeeze(-1), self.bn
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance, statistics = norm.running_mean, norm.running_var, logits.new_zeros(len(mask), 2)
        if self.training:
            count = len(nodes) * mask.sum(1)
            mean = (logits * mask).sum((0, 2)) / count
            variance = ((logits - mean[:, None]).square() * mask).sum((0, 2)) / count
            statistics = torch.stack([mean, variance * count / (count - 1).clamp(min=1)], 1).detach()
            mean, variance = mean[:, None], variance[:, None]
        gates = ((logits - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias).sigmoid()
        return l2((l1(gates * mask).unsqueeze(-2) @ nodes).squeeze(-2)), statistics

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


class SimilarityMatcher(LateInteraction):
    """The common part of SGR and SAF: attention, similarity vectors, chunking. `regions` is the number of batch-norm slots.

    In training the norms see the block that is scored: the batch of this rank, or with the method's `gather` the batches of all ranks,
    as if one process had them. `chunk_elements` bounds the largest tensor of a chunk, images x words x width; `recompute` runs the chunks again in the
    backward pass instead of keeping their activations. Neither changes a number.
    """

    couples_pairs: ClassVar[bool] = False
    """In training, the score of a pair depends on the other pairs."""
    gru_dropout = 0.4
    chunk_elements: int = 1 << 24

    def __init__(
        self,
        *,
        vocab_size: int,
        image: Options | None = None,
        text: Options | None = None,
        sim_dim: int = 256,
        regions: int = 36,
        dropout: float = 0.4,
    ) -> None:
        super().__init__(vocab_size=vocab_size, image=image, text=text)
        self.regions = regions
        self.v_global_w = ImageGlobal(self.width, regions, dropout)
        self.t_global_w = TextGlobal(self.width, dropout)
        self.sim_tranloc_w, self.sim_tranglo_w = xavier(self.width, sim_dim), xavier(self.width, sim_dim)
        self.sim_eval_w = xavier(sim_dim, 1)
        self.kept: dict[str, tuple[Encoded, Tensor]] = {}
        self.options = {**self.towers, "sim_dim": sim_dim, "regions": regions, "dropout": dropout}

    def reason(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """nodes (I,T,K,S), the global node first, mask (T,K) or (I,T,K) -> score vectors (I,T,S), batch statistics a caption (T,2)."""
        raise NotImplementedError

    def reason_unmasked(self, nodes: Tensor) -> Tensor:
        raise NotImplementedError  # see `itm.matchers.late.sgraf_tiles.Scorer`

    def track(self, statistics: Tensor) -> None:
        """Running statistics of a training block; rows are captions, longest first."""

    def encode_images(self, images: Images) -> Encoded:
        """Raises ValueError when the number of region slots is not the one the batch norm was built for."""
        encoded = super().encode_images(images)
        self._check_slots(encoded)
        return encoded

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T) in (0,1). In training batch norm sees this block. Raises ValueError for one image in training."""
        (regions, region_mask), (words, word_mask) = parts_of(images), parts_of(captions)
        whole_images, whole_captions = self._whole(images, captions)
        if self.cuts_tiles(captions):
            return tiled_scores(self, images, captions, whole_images, whole_captions)
        lengths = word_mask.sum(1)
        order = lengths.argsort(descending=True, stable=True)
        width = self.sim_tranloc_w.out_features if packs(regions) else self.width  # the widest that a chunk keeps
        scores, statistics, block = [], [], functools.partial(block_scores, self)
        for chosen in like_length(order, lengths[order].tolist(), max(1, self.chunk_elements // (len(images) * width))):
            longest = int(lengths[chosen[0]])
            chunk = words[chosen, :longest], word_mask[chosen, :longest], whole_captions[chosen]
            inputs = (regions, region_mask, whole_images), chunk
            keep_less = self.recompute and torch.is_grad_enabled()
            found, block_statistics = checkpoint(block, *inputs, use_reentrant=False) if keep_less else block(*inputs)
            scores.append(found)
            statistics.append(block_statistics)
        if self.training:
            self.track(torch.cat(statistics))
        return torch.cat(scores, 1)[:, order.argsort()]

    def split_score(self, images: Encoded, captions: Encoded) -> SplitScore | None:
        with torch.no_grad():
            if self.couples_pairs or not can_tile(captions):
                return None
        whole = self._whole(images, captions)
        with torch.no_grad():
            scores = tiled_scores(self, images, captions, *whole)
        score = functools.partial(chosen_scores, self, *whole, gram(parts_of(images)[0]))
        return SplitScore(scores, lambda rows, columns: score_pairs(score, images, captions, rows, columns, self.recompute))

    def _whole(self, images: Encoded, captions: Encoded) -> tuple[Tensor, Tensor]:
        """(SGRAF 1) and (SGRAF 2): (I,D), (T,D)."""
        self._check_slots(images)
        if self.training and len(images) < 2:
            raise ValueError("batch norm of SGR and SAF needs at least 2 images a training step: raise train.batch_size, or call eval()")
        whole = self.v_global_w(*parts_of(images)), self.t_global_w(*parts_of(captions))
        if self.training and self.keeps_whole:
            self.kept = {"image": (images, whole[0]), "text": (captions, whole[1])}
        return whole

    def whole(self, encoded: Encoded, side: str) -> Tensor:
        """(SGRAF 1) or (SGRAF 2). In training that of the last `score` where it is of the same rows: the norms see a batch once."""
        rows, vector = self.kept.pop(side, (None, None))
        if rows is encoded and vector is not None:
            return vector
        return (self.v_global_w if side == "image" else self.t_global_w)(*parts_of(encoded))

    def cuts_tiles(self, captions: Encoded) -> bool:
        """Whether `score` cuts its own tiles and builds nothing as large as all pairs: in evaluation without gradient."""
        return not self.training and can_tile(captions)

    def _check_slots(self, images: Encoded) -> None:
        assert images.parts is not None
        if images.parts.shape[1] != self.regions:
            raise ValueError(
                f"{images.parts.shape[1]} regions an image, but the batch norm of {type(self).__name__} has {self.regions} slots: "
                f"set model.options.regions={images.parts.shape[1]} for a new model, or give an imported one {self.regions} regions"
            )

    def weights(self, image: Encoded, caption: Encoded) -> Tensor:
        (parts, mask), (words, _) = parts_of(image), parts_of(caption)
        return attend(raw_scores(words, parts), mask)[0]


class SGR(SimilarityMatcher):
    """Similarity graph reasoning: `steps` graph steps over the nodes; the score is read from the global node."""

    kind: ClassVar[str] = "sgr"

    def __init__(
        self,
        *,
        vocab_size: int,
        image: Options | None = None,
        text: Options | None = None,
        sim_dim: int = 256,
        regions: int = 36,
        dropout: float = 0.4,
        steps: int = 3,
    ) -> None:
        super().__init__(vocab_size=vocab_size, image=image, text=text, sim_dim=sim_dim, regions=regions, dropout=dropout)
        self.SGR_module = nn.ModuleList(GraphReasoning(sim_dim) for _ in range(steps))
        self.options["steps"] = steps

    def reason(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        images, captions = nodes.shape[:2]
        z, real = nodes.flatten(0, 1), mask.expand(nodes.shape[:3]).flatten(0, 1)
        for k, step in enumerate(self.SGR_module):
            z = step(z, real, last=k == len(self.SGR_module) - 1)
        return z[:, 0].view(images, captions, -1), nodes.new_zeros(captions, 2)

    def reason_unmasked(self, nodes: Tensor) -> Tensor:
        for k, step in enumerate(self.SGR_module):
            assert isinstance(step, GraphReasoning)
            nodes = step.unmasked(nodes, last=k == len(self.SGR_module) - 1)
        return nodes[:, 0]


class SAF(SimilarityMatcher):
    """Similarity attention filtration: the nodes weighted by gates, which a batch norm over all images of a caption couples."""

    couples_pairs = True
    kind: ClassVar[str] = "saf"

    def __init__(
        self,
        *,
        vocab_size: int,
        image: Options | None = None,
        text: Options | None = None,
        sim_dim: int = 256,
        regions: int = 36,
        dropout: float = 0.4,
    ) -> None:
        super().__init__(vocab_size=vocab_size, image=image, text=text, sim_dim=sim_dim, regions=regions, dropout=dropout)
        self.SAF_module = AttentionFiltration(sim_dim)

    def reason(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.SAF_module(nodes, mask)

    def reason_unmasked(self, nodes: Tensor) -> Tensor:
        return self.SAF_module.unmasked(nodes)

    def track(self, statistics: Tensor) -> None:
        self.SAF_module.track(statistics)
