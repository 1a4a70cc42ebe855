"""UNITER: one Transformer over the words and the regions of a pair; the base of IAIS.

Equations: Chen et al., arXiv 1909.11740, as in the authors' code. The state dict has the authors' names, so their checkpoints load as
they are (`itm.importers.uniter`). Extension: `image` puts the patch tokens of any image encoder in the place of the regions,
with the box of each patch in the place of the region's box.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertAttention, BertEmbeddings, BertIntermediate, BertOutput, BertPooler

from itm.kinds import refuse_unknown
from itm.matchers.encoders.build import Encoder, build_image_encoder, options_of
from itm.matchers.joint.pairs import compact, joint_sequence, parts_of, relation_blocks, scaled_products
from itm.types import Captions, Encoded, Images, Matcher, Options, Pairs

CPU_TOKENS = 4096  # of one joint forward pass on a CPU: 12 MB at width 768


class UNITEROptions(TypedDict, total=False):
    """`image` = {"kind": ..., option: value} of `itm.matchers.encoders.build` replaces regions by patch tokens. `score_tokens` bounds the
    tokens of one joint forward in `score`, hence its memory; `recompute` runs those chunks again in the backward pass instead of keeping
    them. `intermediate` defaults to 4 x hidden; `init_std` 0.02 is BERT's, too small to train a narrow model (hidden < 256) from scratch:
    there take about hidden^-0.5. `relation_layer`: whose attention IAIS and ISD read, 1 to `layers`; None: the last one.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int | None
    positions: int
    dropout: float
    region_dim: int
    image: Options | None
    score_tokens: int
    recompute: bool
    init_std: float
    relation_layer: int | None


DEFAULTS: UNITEROptions = {
    "hidden": 768,
    "layers": 12,
    "heads": 12,
    "intermediate": None,
    "positions": 512,
    "dropout": 0.1,
    "region_dim": 2048,
    "image": None,
    "score_tokens": 32768,
    "recompute": False,
    "init_std": 0.02,
    "relation_layer": None,
}


class UNITER(Matcher):
    """Single-stream matcher. `encode_*` give the embedded inputs; `score` runs the joint encoder once per pair. See `UNITEROptions`."""

    kind: ClassVar[str] = "uniter"
    joint: ClassVar[bool] = True
    regions: int = 100
    needs_boxes: ClassVar[bool] = True

    def __init__(self, *, vocab_size: int, **options: Unpack[UNITEROptions]) -> None:
        """Raises ValueError for an unknown option, a hidden size that the heads do not divide, an image encoder without patch tokens."""
        super().__init__()
        refuse_unknown(options, UNITEROptions.__annotations__, "UNITER")
        o: UNITEROptions = {**DEFAULTS, **options}
        hidden, image = o["hidden"], o["image"]
        if hidden % o["heads"]:
            raise ValueError(f"model.options: hidden={hidden} is not a multiple of heads={o['heads']}")
        self.image_encoder = None
        if image is not None:
            self.image_encoder = _patch_encoder(image)
            o["region_dim"] = self.image_encoder.width
            o["image"] = {"kind": image["kind"], **options_of(self.image_encoder, {})}
        self.options = {name: value for name, value in o.items() if name != "relation_layer" or value is not None}
        self.region_dim, self.positions, self.relation_layer = o["region_dim"], o["positions"], _relation_layer(o)
        self.score_tokens, self.recompute = o["score_tokens"], o["recompute"]
        self.vector_width = hidden  # of the mean of the embedded inputs, which CUSA's uni-modal term reads
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_hidden_layers=o["layers"],
            num_attention_heads=o["heads"],
            intermediate_size=o["intermediate"] or 4 * hidden,
            max_position_embeddings=self.positions,
            hidden_dropout_prob=o["dropout"],
            attention_probs_dropout_prob=o["dropout"],
        )
        config._attn_implementation = "sdpa"
        self.dropped: list[str] = []  # keys of an imported checkpoint that belong to pre-training only
        self.uniter = _Body(config, functools.partial(self.region_embeddings, config, self.region_dim))
        self.itm_output = nn.Linear(hidden, 2)
        self.rank_output = nn.Linear(hidden, 1)
        for module in (self.uniter, self.itm_output, self.rank_output):
            module.apply(functools.partial(_initialise, std=o["init_std"]))
        self.itm_output.requires_grad_(False)  # takes no part in retrieval: DDP would wait for gradients that never come

    @staticmethod
    def region_embeddings(config: BertConfig, region_dim: int) -> nn.Module:
        """Makes (N,R,H) of regions (N,R,D), their boxes (N,R,7) or None, and the embeddings of the text."""
        return ImageEmbeddings(config, region_dim)

    def layers(self) -> list[nn.Module]:
        own = [] if self.image_encoder is None else [self.image_encoder]
        return [*own, *self.uniter.encoder.layer]

    def encode_images(self, images: Images) -> Encoded:
        """parts (N,R,H) of `region_embeddings`, mask (N,R), cut to the largest region count."""
        name, patches = type(self).__name__, self.image_encoder
        regions, boxes, mask = patch_inputs(patches(images)) if patches else region_inputs(images, name, self.needs_boxes)
        if regions.shape[-1] != self.region_dim:
            raise ValueError(f"regions are {regions.shape[-1]} wide, this {name} takes {self.region_dim}: set model.options.region_dim")
        known = images.host.mask if mask is images.mask else mask
        assert known is not None
        width = int(known.sum(1).max())
        dtype = self.rank_output.weight.dtype
        boxes = None if boxes is None else boxes[:, :width].to(dtype)
        parts = self.uniter.img_embeddings(regions[:, :width].to(dtype), boxes, self.uniter.embeddings)
        return Encoded(parts=parts, mask=mask[:, :width])

    def encode_captions(self, captions: Captions) -> Encoded:
        """parts (N,L,H) = LN(word + position + type 0), mask (N,L), cut to the longest caption; start and end stay in."""
        known = captions.host
        lengths = known.mask.sum(1)
        if not bool((lengths > 0).all()):
            raise ValueError("a caption has 0 tokens, not even start and end: the tokenizer must add them (caption mask is all False)")
        width = int(lengths.max())
        if width > self.positions:
            raise ValueError(
                f"a caption has {width} tokens, this UNITER has {self.positions} positions: set text.max_length={self.positions} or less"
            )
        tokens, mask, seen = captions.tokens[:, :width], captions.mask[:, :width], known.tokens[:, :width]
        words = self.uniter.embeddings.word_embeddings.num_embeddings
        if bool((seen >= words).any()):
            raise ValueError(f"token id {int(seen.max())} but the vocabulary has {words} words: the tokenizer is not this model's")
        return Encoded(parts=self.uniter.embeddings(input_ids=tokens), mask=mask)

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        """(I,T) raw scores of the rank head, every pair through the joint encoder, in chunks of `score_tokens` tokens."""
        (_, region_mask), (_, word_mask) = parts_of(images), parts_of(captions)
        n_captions = len(captions)
        # Pairs of like length share a chunk, so that compacting leaves little padding; a CPU gains nothing from large ones.
        flat = (region_mask.sum(1)[:, None] + word_mask.sum(1)[None, :]).flatten().argsort(stable=True)
        tokens = min(self.score_tokens, CPU_TOKENS) if flat.device.type == "cpu" else self.score_tokens
        chunk = max(1, tokens // (region_mask.shape[1] + word_mask.shape[1]))
        scores = torch.cat([self._score_rows(images[f // n_captions], captions[f % n_captions]) for f in flat.split(chunk)])
        return scores[flat.argsort()].view(len(images), n_captions)

    def pairs(self, images: Encoded, captions: Encoded, relations_of: Tensor | None = None) -> Pairs:
        """Row-aligned pairs: scores (N,), and the relation blocks of `relation_layer` for the rows `relations_of` (G,) int64."""
        joint, mask = joint_sequence(images, captions)
        if relations_of is None:
            return Pairs(self._rank(*compact(joint, mask)))
        hidden, products = self.uniter.encode_with_products(joint, mask, relations_of, self.relation_layer)
        masks = parts_of(captions)[1][relations_of], parts_of(images)[1][relations_of]
        return Pairs(self._head(hidden), relation_blocks(products, masks, masks[0].shape[1]))

    def attention(self, images: Encoded, captions: Encoded) -> Tensor | None:
        """(N,L,R) weights of the last layer among the words and regions of a pair, start and end of the caption 0."""
        found = self.pairs(images, captions, torch.arange(len(images), device=parts_of(images)[1].device)).relations
        return None if found is None else nn.functional.pad(found.blocks[2], (0, 0, 1, 1))

    def _score_rows(self, images: Encoded, captions: Encoded) -> Tensor:
        joint, mask = compact(*joint_sequence(images, captions))
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._rank, joint, mask, use_reentrant=False)
        return self._rank(joint, mask)

    def _rank(self, joint: Tensor, mask: Tensor) -> Tensor:
        return self._head(self.uniter.encode(joint, mask))

    def _head(self, hidden: Tensor) -> Tensor:
        return self.rank_output(self.uniter.pooler(hidden)).squeeze(-1)


def _relation_layer(o: UNITEROptions) -> int:
    number = o["layers"] if o["relation_layer"] is None else o["relation_layer"]
    if not 1 <= number <= o["layers"]:
        raise ValueError(f"model.options.relation_layer={number} is none of the layers 1 to {o['layers']}")
    return number


def region_inputs(images: Images, name: str = "UNITER", boxes: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """(regions (N,R,D), boxes (N,R,7) or None, mask (N,R)). Raises ValueError, naming the matcher, for images without regions or,
    where it needs `boxes`, without these, or with boxes of another form."""
    if images.regions is None or (boxes and images.boxes is None):
        wanted = "regions with boxes" if boxes else "regions"
        raise ValueError(f"{name} takes {wanted}: set data.image=regions, or model.options.image to an image encoder")
    if boxes and images.boxes is not None and images.boxes.shape[-1] != 7:
        raise ValueError(f"a UNITER box has 7 numbers (x1 y1 x2 y2 w h w*h, each relative to the image), not {images.boxes.shape[-1]}")
    mask = images.mask if images.mask is not None else images.regions.new_ones(images.regions.shape[:2], dtype=torch.bool)
    return images.regions, images.boxes if boxes else None, mask


def patch_inputs(encoded: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    """The same from patch tokens, each with the box of its patch."""
    assert encoded.parts is not None
    parts = encoded.parts
    mask = encoded.mask if encoded.mask is not None else parts.new_ones(parts.shape[:2], dtype=torch.bool)
    return parts, patch_boxes(parts.shape[1]).to(parts).expand(len(parts), -1, -1), mask


class JointLayer(nn.Module):
    """One BERT layer over the joint sequence, with the names of the authors' state dict."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention, self.heads = BertAttention(config), config.num_attention_heads
        self.intermediate, self.output = BertIntermediate(config), BertOutput(config)

    def forward(self, hidden: Tensor, mask: Tensor, products_of: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """hidden (N,L,H), mask (N,L) bool: which keys are seen -> (N,L,H), and `scaled_products` of the rows `products_of`."""
        own = self.attention.self
        products = None if products_of is None else scaled_products(hidden[products_of], own.query, own.key, self.heads)
        seen = self.attention(hidden, mask[:, None, None, :])[0]
        return self.output(self.intermediate(seen), seen), products


class _Layers(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(JointLayer(config) for _ in range(config.num_hidden_layers))


class _Body(nn.Module):
    """The part of the authors' state dict that is called `uniter`."""

    def __init__(self, config: BertConfig, region_embeddings: Callable[[], nn.Module]):
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.img_embeddings = region_embeddings()
        self.encoder = _Layers(config)
        self.pooler = BertPooler(config)

    def encode(self, joint: Tensor, mask: Tensor) -> Tensor:
        """(N,L,H) through all layers; mask (N,L) bool says which keys are seen."""
        for layer in self.encoder.layer:
            joint, _ = layer(joint, mask)
        return joint

    def encode_with_products(self, joint: Tensor, mask: Tensor, rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The same, and the `scaled_products` of one layer, counted from 1, for some rows."""
        products = None
        for n, layer in enumerate(self.encoder.layer, 1):
            joint, found = layer(joint, mask, rows if n == number else None)
            products = found if n == number else products
        assert products is not None
        return joint, products


class ImageEmbeddings(nn.Module):
    """regions (N,R,D), boxes (N,R,7), embeddings of the text -> LN(LN(W_f f + b_f) + LN(W_b box + b_b) + their type 1), dropout."""

    def __init__(self, config: BertConfig, region_dim: int):
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.img_linear = nn.Linear(region_dim, hidden)
        self.img_layer_norm = nn.LayerNorm(hidden, eps=eps)
        self.pos_layer_norm = nn.LayerNorm(hidden, eps=eps)
        self.pos_linear = nn.Linear(7, hidden)
        self.mask_embedding = nn.Embedding(2, region_dim, padding_idx=0)  # of masked-region pre-training
        self.mask_embedding.requires_grad_(False)
        self.LayerNorm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, regions: Tensor, boxes: Tensor, text: BertEmbeddings) -> Tensor:
        kind = text.token_type_embeddings.weight[1]
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


def _patch_encoder(image: Options) -> Encoder:
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
