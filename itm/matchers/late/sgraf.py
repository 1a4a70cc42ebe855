"""SGR and SAF (Diao et al., AAAI 2021): similarity vectors of words and of the whole pair, reasoned over or filtered.

As in the authors' code, module names included, with the exact transformations of
docs/methods/sgraf.md#exact-transformations: captions are scored in chunks of like length against all images of the block, masked where
padded. SGRAF is the mean of the scores of one SGR and one SAF, trained apart: `score_matrix([sgr, saf], ...)`, or the kind `mean`.
`sgraf` is the two trained together on similarity vectors that they share (docs/methods/sgraf.md#joint-training-and-ablations).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from itm.matchers.late.base import LateInteraction, gram, parts_of, raw_scores
from itm.matchers.late.pairs import like_length, split_by
from itm.matchers.late.sgraf_blocks import attend, chosen_scores, packed_nodes, packs, unit_weights
from itm.matchers.late.sgraf_modules import (
    AttentionFiltration,
    GraphReasoning,
    ImageGlobal,
    SlotNorm,
    TextGlobal,
    graph_reasoned,
    graph_reasoned_unmasked,
)
from itm.matchers.late.sgraf_tiles import tiled_scores
from itm.matchers.late.tiles import can_tile
from itm.matchers.norms import full, l2, xavier
from itm.types import Encoded, Images, Options, SplitScore

__all__ = ["SAF", "SGR", "SGRAF", "AttentionFiltration", "GraphReasoning", "SlotNorm"]

Nodes = Literal["all", "local", "global"]
Readout = Literal["reasoning", "mean"]


class Ablations(TypedDict, total=False):
    """nodes: all similarity vectors, those of the words alone (`local`), or that of the pair alone (`global`). readout: what the score is
    read from: the matcher's own reasoning, or the `mean` of the nodes in its place."""

    nodes: Nodes
    readout: Readout


Side = tuple[Tensor, Tensor, Tensor | None]
"""parts, mask and global vectors (None of local nodes alone) of one side."""


class SimilarityVectors(LateInteraction):
    """What SGR and SAF are read from: attention of words to regions, global vectors, and the similarity vectors (nodes) of pairs."""

    gru_dropout = 0.4

    def __init__(
        self,
        *,
        vocab_size: int,
        image: Options | None = None,
        text: Options | None = None,
        sim_dim: int = 256,
        regions: int = 36,
        dropout: float = 0.4,
        **ablations: Unpack[Ablations],
    ) -> None:
        """Raises ValueError for ablations that are not known. What they leave out is not built."""
        super().__init__(vocab_size=vocab_size, image=image, text=text)
        self.regions = regions
        self.kept_nodes, self.readout = _read_ablations(ablations)
        if self.kept_nodes != "local":
            self.v_global_w = ImageGlobal(self.width, regions, dropout)
            self.t_global_w = TextGlobal(self.width, dropout)
        if self.kept_nodes != "global":
            self.sim_tranloc_w = xavier(self.width, sim_dim)
        if self.kept_nodes != "local":
            self.sim_tranglo_w = xavier(self.width, sim_dim)
        self.sim_eval_w = xavier(sim_dim, 1)
        self.kept: dict[str, tuple[Encoded, Tensor]] = {}
        self.options = {**self.towers, "sim_dim": sim_dim, "regions": regions, "dropout": dropout, **ablations}

    @property
    def whole_method(self) -> bool:
        """Nothing is ablated."""
        return (self.kept_nodes, self.readout) == ("all", "reasoning")

    def encode_images(self, images: Images) -> Encoded:
        """Raises ValueError when the number of region slots is not the one the batch norm was built for."""
        encoded = super().encode_images(images)
        self._check_slots(encoded)
        return encoded

    def node_mask(self, words: Tensor) -> Tensor:
        """Which nodes are real, from the mask of the words: (T,L) -> (T,K)."""
        if self.kept_nodes == "global":
            return words.new_ones(len(words), 1)
        return words if self.kept_nodes == "local" else F.pad(words, (1, 0), value=True)

    def nodes(self, images: Side, captions: Side) -> Tensor:
        """(I,T,1+L,S) unit similarity vectors of the pair and of each word (docs/methods/sgraf.md#similarity-vectors), or those of them
        that are kept."""
        (parts, mask, whole), (words, word_mask, whole_words) = images, captions
        kept = []
        if whole is not None and whole_words is not None:
            kept.append(l2(self.sim_tranglo_w((whole[:, None] - whole_words[None]).square())).unsqueeze(2))
        if self.kept_nodes == "global":
            return kept[0]
        weights = unit_weights(raw_scores(words, parts), mask, gram(parts))
        if kept and packs(parts):
            return packed_nodes(weights, parts, words, word_mask, self.sim_tranloc_w, kept[0].squeeze(2))
        attended = (weights.flatten(1, 2) @ parts).view(len(parts), *words.shape)
        return torch.cat([*kept, l2(self.sim_tranloc_w((attended - words).square()))], 2)

    def weights(self, image: Encoded, caption: Encoded) -> Tensor:
        (parts, mask), (words, _) = parts_of(image), parts_of(caption)
        return attend(raw_scores(words, parts), mask)[0]

    def _check_slots(self, images: Encoded) -> None:
        assert images.parts is not None
        if self.kept_nodes != "local" and images.parts.shape[1] != self.regions:
            raise ValueError(
                f"{images.parts.shape[1]} regions an image, but the batch norm of {type(self).__name__} has {self.regions} slots: "
                f"set model.options.regions={images.parts.shape[1]} for a new model, or give an imported one {self.regions} regions"
            )


class SimilarityMatcher(SimilarityVectors):
    """The common part of SGR and SAF: from similarity vectors to scores, in chunks. `regions` is the number of batch-norm slots.

    In training the norms see the block that is scored: the batch of this rank, or with the method's `gather` the batches of all ranks,
    as if one process had them. `chunk_elements` bounds images x words x width of a chunk; `recompute` runs the chunks again in the
    backward pass instead of keeping their activations. Neither changes a number.
    """

    chunk_elements: int = 1 << 24

    def reason(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """nodes (I,T,K,S) with the global node first, mask (T,K) or (I,T,K) -> score vectors (I,T,S), statistics a caption (T,2)."""
        raise NotImplementedError

    def reason_unmasked(self, nodes: Tensor) -> Tensor:
        raise NotImplementedError  # see `itm.matchers.late.sgraf_tiles.Scorer`

    def read(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """nodes (I,T,K,S), mask (T,K) -> scores (...,I,T) in (0,1), at least float32, and batch statistics a caption (T,2)."""
        if self.readout == "mean":
            vectors = (nodes * mask[..., None]).sum(2) / mask.sum(1)[:, None]
            return self.scored(vectors), nodes.new_zeros(len(mask), 2)
        vectors, statistics = self.reason(nodes, mask)
        return self.scored(vectors), statistics

    def read_unmasked(self, nodes: Tensor) -> Tensor:
        """Unit nodes (P,K,S) in the type of the products, all real, the global one first -> scores (P,) at least float32."""
        return self.scored(self.reason_unmasked(nodes))

    def scored(self, vectors: Tensor) -> Tensor:
        """(...,S) -> (...) in (0,1)."""
        with torch.autocast(vectors.device.type, enabled=False):  # a bfloat16 score has 8 bits: many pairs would tie
            return self.sim_eval_w(full(vectors)).squeeze(-1).sigmoid()

    def track(self, statistics: Tensor) -> None:
        """Running statistics of a training block; rows are captions, longest first."""

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T) in (0,1). In training batch norm sees this block. Raises ValueError for one image in training."""
        return self._scores(images, captions)

    def _scores(self, images: Encoded, captions: Encoded) -> Tensor:
        """(...,I,T): what `read` gives of all pairs."""
        (regions, region_mask), (words, word_mask) = parts_of(images), parts_of(captions)
        whole_images, whole_captions = self.both_whole(images, captions)
        if self.cuts_tiles(captions) and whole_images is not None and whole_captions is not None:
            return tiled_scores(self, images, captions, whole_images, whole_captions)
        width = self.sim_eval_w.in_features if packs(regions) else self.width  # of what a chunk keeps
        lengths = word_mask.sum(1)
        order = lengths.argsort(descending=True, stable=True)
        scores, statistics = [], []
        for chosen in like_length(order, lengths[order].tolist(), max(1, self.chunk_elements // (len(images) * width))):
            longest = int(lengths[chosen[0]])
            chunk = words[chosen, :longest], word_mask[chosen, :longest], None if whole_captions is None else whole_captions[chosen]
            inputs = (regions, region_mask, whole_images), chunk
            keep_less = self.recompute and torch.is_grad_enabled()
            block, block_statistics = checkpoint(self._block, *inputs, use_reentrant=False) if keep_less else self._block(*inputs)
            scores.append(block)
            statistics.append(block_statistics)
        if self.training:
            self.track(torch.cat(statistics))
        return torch.cat(scores, -1)[..., order.argsort()]

    def both_whole(self, images: Encoded, captions: Encoded) -> tuple[Tensor | None, Tensor | None]:
        """(SGRAF 1) (I,D) and (SGRAF 2) (T,D), once a step, or None where local nodes alone are kept."""
        self._check_slots(images)
        if self.training and len(images) < 2:
            raise ValueError("batch norm of SGR and SAF needs at least 2 images a training step: raise train.batch_size, or call eval()")
        if self.kept_nodes == "local":
            return None, None
        whole = self.v_global_w(*parts_of(images)), self.t_global_w(*parts_of(captions))
        if self.training and self.keeps_whole:
            self.kept = {"image": (images, whole[0]), "text": (captions, whole[1])}
        return whole

    def whole(self, encoded: Encoded, side: str) -> Tensor | None:
        """(SGRAF 1) or (SGRAF 2), None where local nodes alone are kept. In training that of the last `score` where it is of the same rows:
        the norms see a batch once."""
        rows, vector = self.kept.pop(side, (None, None))
        if self.kept_nodes == "local" or (rows is encoded and vector is not None):
            return vector
        return (self.v_global_w if side == "image" else self.t_global_w)(*parts_of(encoded))

    def cuts_tiles(self, captions: Encoded) -> bool:
        """Whether `score` cuts its own tiles and builds nothing as large as all pairs: in evaluation without gradient."""
        return not self.training and self.whole_method and can_tile(captions)

    def _block(self, images: Side, captions: Side) -> tuple[Tensor, Tensor]:
        """All images against one chunk of captions, each as (parts, mask, global vectors): (...,I,T) and statistics (T,2)."""
        return self.read(self.nodes(images, captions), self.node_mask(captions[1]))


def _read_ablations(given: Ablations) -> tuple[Nodes, Readout]:
    """Raises ValueError for what is not known."""
    nodes, readout = given.get("nodes", "all"), given.get("readout", "reasoning")
    if nodes not in ("all", "local", "global"):
        raise ValueError(f"model.options.nodes is all, local or global, not {nodes!r}")
    if readout not in ("reasoning", "mean"):
        raise ValueError(f"model.options.readout is reasoning or mean, not {readout!r}")
    return nodes, readout


class SGR(SimilarityMatcher):
    """Similarity graph reasoning: `steps` graph steps over the nodes; the score is read from the global node, else from their mean."""

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
        **ablations: Unpack[Ablations],
    ) -> None:
        super().__init__(vocab_size=vocab_size, image=image, text=text, sim_dim=sim_dim, regions=regions, dropout=dropout, **ablations)
        if self.readout == "reasoning":
            self.SGR_module = nn.ModuleList(GraphReasoning(sim_dim) for _ in range(steps))
        self.options["steps"] = steps

    def split_score(self, images: Encoded, captions: Encoded) -> SplitScore | None:
        with torch.no_grad():
            if not self.whole_method or not can_tile(captions):
                return None
        whole_images, whole_captions = self.both_whole(images, captions)
        if whole_images is None or whole_captions is None:
            return None
        with torch.no_grad():
            scores = tiled_scores(self, images, captions, whole_images, whole_captions)
        score = functools.partial(chosen_scores, self, whole_images, whole_captions, gram(parts_of(images)[0]))
        return split_by(scores, score, images, captions, self.recompute)

    def reason(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        vectors = graph_reasoned(self.SGR_module, nodes, mask, whole=self.kept_nodes != "local")
        return vectors, nodes.new_zeros(len(mask), 2)

    def reason_unmasked(self, nodes: Tensor) -> Tensor:
        return graph_reasoned_unmasked(self.SGR_module, nodes)


class SAF(SimilarityMatcher):
    """Similarity attention filtration: the nodes weighted by gates."""

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
        **ablations: Unpack[Ablations],
    ) -> None:
        super().__init__(vocab_size=vocab_size, image=image, text=text, sim_dim=sim_dim, regions=regions, dropout=dropout, **ablations)
        if self.readout == "reasoning":
            self.SAF_module = AttentionFiltration(sim_dim)

    def reason(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.SAF_module(nodes, mask)

    def reason_unmasked(self, nodes: Tensor) -> Tensor:
        return self.SAF_module.unmasked(nodes)

    def track(self, statistics: Tensor) -> None:
        if self.readout == "reasoning":
            self.SAF_module.track(statistics)


class SGRAF(SimilarityMatcher):
    """SGR and SAF on the same similarity vectors, trained together by the sum of their losses; the score is the mean of the two scores.

    docs/methods/sgraf.md#joint-training-and-ablations.
    """

    kind: ClassVar[str] = "sgraf"

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
        self.SAF_module = AttentionFiltration(sim_dim)
        self.saf_eval_w = xavier(sim_dim, 1)
        self.options["steps"] = steps

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        scores = self._scores(images, captions)
        return scores if scores.dim() == 2 else scores.mean(0)

    def training_scores(self, images: Encoded, captions: Encoded) -> Sequence[Tensor]:
        """That of SGR and that of SAF."""
        return list(self._scores(images, captions))

    def read(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (2,I,T): of SGR and of SAF."""
        filtered, statistics = self.SAF_module(nodes, mask)
        return self._both(graph_reasoned(self.SGR_module, nodes, mask), filtered), statistics

    def read_unmasked(self, nodes: Tensor) -> Tensor:
        return self._both(graph_reasoned_unmasked(self.SGR_module, nodes), self.SAF_module.unmasked(nodes)).mean(0)

    def track(self, statistics: Tensor) -> None:
        self.SAF_module.track(statistics)

    def _both(self, reasoned: Tensor, filtered: Tensor) -> Tensor:
        with torch.autocast(reasoned.device.type, enabled=False):
            rows = self.sim_eval_w(full(reasoned)), self.saf_eval_w(full(filtered))
            return torch.stack(rows).squeeze(-1).sigmoid()
