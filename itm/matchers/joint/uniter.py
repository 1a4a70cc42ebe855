"""UNITER: one Transformer over the words and the regions of a pair; the base of IAIS.

Equations: Chen et al., arXiv 1909.11740, as in the authors' code. The state dict has the authors' names, so their checkpoints load as
they are (`itm.importers.uniter`). Extension: `image` puts the patch tokens of any image encoder in the place of the regions,
with the box of each patch in the place of the region's box.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertPooler

from itm.matchers.encoders.build import build_image_encoder
from itm.matchers.joint.pairs import Pairs, compact, joint_sequence, parts_of, relation_blocks
from itm.types import Captions, Encoded, Images


class UNITER(nn.Module):
    """Single-stream matcher. `encode_*` give the embedded inputs; `score` runs the joint encoder once per pair.

    `image` = {"kind": ..., option: value} of `itm.matchers.encoders.build` replaces regions by patch tokens. `score_tokens` bounds the
    tokens of one joint forward in `score`, hence its memory; `recompute` runs those chunks again in the backward pass instead of keeping
    them. `intermediate` defaults to 4 x hidden; `init_std` 0.02 is BERT's, too small to train a narrow model (hidden < 256) from scratch:
    there take about hidden^-0.5. Raises ValueError for a hidden size that the heads do not divide.
    """

    kind: ClassVar[str] = "uniter"

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden: int = 768,
        layers: int = 12,
        heads: int = 12,
        intermediate: int | None = None,
        positions: int = 512,
        dropout: float = 0.1,
        region_dim: int = 2048,
        image: dict[str, Any] | None = None,
        score_tokens: int = 32768,
        recompute: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"model.options: hidden={hidden} is not a multiple of heads={heads}")
        self.image_encoder = None if image is None else _patch_encoder(image)
        if image is not None and self.image_encoder is not None:
            region_dim = self.image_encoder.width
            image = {"kind": image["kind"], **getattr(self.image_encoder, "options", {})}
        self.options = {
            "hidden": hidden,
            "layers": layers,
            "heads": heads,
            "intermediate": intermediate,
            "positions": positions,
            "dropout": dropout,
            "region_dim": region_dim,
            "image": image,
            "score_tokens": score_tokens,
            "recompute": recompute,
            "init_std": init_std,
        }
        self.region_dim, self.positions, self.score_tokens, self.recompute = region_dim, positions, score_tokens, recompute
        self.vector_width = hidden  # of the mean of the embedded inputs, which CUSA's uni-modal term reads
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate or 4 * hidden,
            max_position_embeddings=positions,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        config._attn_implementation = "sdpa"
        self.dropped: list[str] = []  # keys of an imported checkpoint that belong to pre-training only
        self.uniter = _Body(config, region_dim)
        self.itm_output = nn.Linear(hidden, 2)
        self.rank_output = nn.Linear(hidden, 1)
        for module in (self.uniter, self.itm_output, self.rank_output):
            module.apply(functools.partial(_initialise, std=init_std))
        # Neither takes part in retrieval: without this, DDP would wait for gradients that never come.
        self.itm_output.requires_grad_(False)
        self.uniter.img_embeddings.mask_embedding.requires_grad_(False)

    def encode_images(self, images: Images) -> Encoded:
        """parts (N,R,H) = LN(LN(W_f f) + LN(W_b box) + type 1), mask (N,R), cut to the largest region count."""
        regions, boxes, mask = self._regions(images) if self.image_encoder is None else self._patches(images)
        if regions.shape[-1] != self.region_dim:
            raise ValueError(f"regions are {regions.shape[-1]} wide, this UNITER takes {self.region_dim}: set model.options.region_dim")
        width = int(mask.sum(1).max())
        regions, boxes, mask = regions[:, :width], boxes[:, :width], mask[:, :width]
        dtype = self.rank_output.weight.dtype
        kind = self.uniter.embeddings.token_type_embeddings.weight[1]
        return Encoded(parts=self.uniter.img_embeddings(regions.to(dtype), boxes.to(dtype), kind), mask=mask)

    def encode_captions(self, captions: Captions) -> Encoded:
        """parts (N,L,H) = LN(word + position + type 0), mask (N,L), cut to the longest caption; start and end stay in."""
        lengths = captions.mask.sum(1)
        if not bool((lengths > 0).all()):
            raise ValueError("a caption has 0 tokens, not even start and end: the tokenizer must add them (caption mask is all False)")
        width = int(lengths.max())
        if width > self.positions:
            raise ValueError(
                f"a caption has {width} tokens, this UNITER has {self.positions} positions: set text.max_length={self.positions} or less"
            )
        tokens, mask = captions.tokens[:, :width], captions.mask[:, :width]
        words = self.uniter.embeddings.word_embeddings.num_embeddings
        if bool((tokens >= words).any()):
            raise ValueError(f"token id {int(tokens.max())} but the vocabulary has {words} words: the tokenizer is not this model's")
        return Encoded(parts=self.uniter.embeddings(input_ids=tokens), mask=mask)

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T) raw scores of the rank head, every pair through the joint encoder, in chunks of `score_tokens` tokens."""
        (_, region_mask), (_, word_mask) = parts_of(images), parts_of(captions)
        n_captions = len(captions)
        # Pairs of like length share a chunk, so that compacting leaves little padding.
        flat = (region_mask.sum(1).argsort()[:, None] * n_captions + word_mask.sum(1).argsort()[None, :]).flatten()
        chunk = max(1, self.score_tokens // (region_mask.shape[1] + word_mask.shape[1]))
        scores = torch.cat([self._score_rows(images[f // n_captions], captions[f % n_captions]) for f in flat.split(chunk)])
        return scores[flat.argsort()].view(len(images), n_captions)

    def pairs(self, images: Encoded, captions: Encoded, relations_of: Tensor | None = None) -> Pairs:
        """Row-aligned pairs: scores (N,), and the relation blocks of the last layer for the rows `relations_of` (G,) int64."""
        joint, mask = joint_sequence(images, captions)
        if relations_of is None:
            return Pairs(self._rank(*compact(joint, mask)))
        last: Any = self.uniter.encoder.layer[-1]
        before = self.uniter.encode(joint, mask, len(self.uniter.encoder.layer) - 1)
        scores = self.rank_output(self.uniter.pooler(_run_layer(last, before, mask))).squeeze(-1)
        masks = parts_of(captions)[1][relations_of], parts_of(images)[1][relations_of]
        return Pairs(scores, relation_blocks(last.attention.self, before[relations_of], masks, masks[0].shape[1]))

    def hidden_states(self, images: Encoded, captions: Encoded) -> Tensor:
        """(N,L+R,H) of the last layer for row-aligned pairs; rows of padding are unspecified."""
        return self.uniter.encode(*joint_sequence(images, captions))

    def _score_rows(self, images: Encoded, captions: Encoded) -> Tensor:
        joint, mask = compact(*joint_sequence(images, captions))
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._rank, joint, mask, use_reentrant=False)
        return self._rank(joint, mask)

    def _rank(self, joint: Tensor, mask: Tensor) -> Tensor:
        return self.rank_output(self.uniter.pooler(self.uniter.encode(joint, mask))).squeeze(-1)

    def _regions(self, images: Images) -> tuple[Tensor, Tensor, Tensor]:
        if images.regions is None or images.boxes is None:
            raise ValueError("UNITER takes regions with boxes: set data.image=regions, or model.options.image to an image encoder")
        if images.boxes.shape[-1] != 7:
            raise ValueError(f"a UNITER box has 7 numbers (x1 y1 x2 y2 w h w*h, each relative to the image), not {images.boxes.shape[-1]}")
        mask = images.mask if images.mask is not None else images.regions.new_ones(images.regions.shape[:2], dtype=torch.bool)
        return images.regions, images.boxes, mask

    def _patches(self, images: Images) -> tuple[Tensor, Tensor, Tensor]:
        assert self.image_encoder is not None
        encoded = self.image_encoder(images)
        assert encoded.parts is not None
        parts = encoded.parts
        mask = encoded.mask if encoded.mask is not None else parts.new_ones(parts.shape[:2], dtype=torch.bool)
        return parts, patch_boxes(parts.shape[1]).to(parts).expand(len(parts), -1, -1), mask


class _Layers(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))


class _Body(nn.Module):
    """The part of the authors' state dict that is called `uniter`."""

    def __init__(self, config: BertConfig, region_dim: int):
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.img_embeddings = ImageEmbeddings(config, region_dim)
        self.encoder = _Layers(config)
        self.pooler = BertPooler(config)

    def encode(self, joint: Tensor, mask: Tensor, layers: int | None = None) -> Tensor:
        """(N,L,H) through the first `layers` layers (all by default); mask (N,L) bool says which keys are seen."""
        for layer in self.encoder.layer[:layers]:
            joint = _run_layer(layer, joint, mask)
        return joint


class ImageEmbeddings(nn.Module):
    """regions (N,R,D), boxes (N,R,7), type vector (H,) -> LN(LN(W_f f + b_f) + LN(W_b box + b_b) + type), dropout."""

    def __init__(self, config: BertConfig, region_dim: int):
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.img_linear = nn.Linear(region_dim, hidden)
        self.img_layer_norm = nn.LayerNorm(hidden, eps=eps)
        self.pos_layer_norm = nn.LayerNorm(hidden, eps=eps)
        self.pos_linear = nn.Linear(7, hidden)
        self.mask_embedding = nn.Embedding(2, region_dim, padding_idx=0)  # of masked-region pre-training
        self.LayerNorm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, regions: Tensor, boxes: Tensor, kind: Tensor) -> Tensor:
        embedded = self.img_layer_norm(self.img_linear(regions)) + self.pos_layer_norm(self.pos_linear(boxes)) + kind
        return self.dropout(self.LayerNorm(embedded))


def patch_boxes(count: int) -> Tensor:
    """(count,7) boxes of a square grid of patches in row order; one token more than a square is a summary of the whole image, first.

    Raises ValueError when neither `count` nor `count - 1` is a square.
    """
    side = math.isqrt(count)
    summary = count - side * side
    if side == 0 or summary > 1:
        raise ValueError(f"{count} image tokens are no square grid of patches (with at most one summary token): use square images")
    edge = torch.arange(side) / side
    y1, x1 = torch.meshgrid(edge, edge, indexing="ij")
    step = torch.full((side * side,), 1 / side)
    x1, y1 = x1.flatten(), y1.flatten()
    grid = torch.stack([x1, y1, x1 + step, y1 + step, step, step, step * step], 1)
    return torch.cat([torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]]).expand(summary, -1), grid])


def _run_layer(layer: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    return layer.feed_forward_chunk(layer.attention(hidden, mask[:, None, None, :])[0])


def _patch_encoder(image: dict[str, Any]) -> Any:
    """Raises ValueError for an encoder without patch tokens."""
    if image.get("kind") == "regions":
        raise ValueError("regions with boxes are UNITER's own input: leave model.options.image out")
    encoder = build_image_encoder(**image)
    if not encoder.width:
        raise ValueError(f"image encoder {image['kind']!r} gives no patch tokens, UNITER needs them: choose one that offers `parts`")
    return encoder


def _initialise(module: nn.Module, std: float) -> None:
    """Linear and embedding weights N(0, std), padding rows included; biases 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
