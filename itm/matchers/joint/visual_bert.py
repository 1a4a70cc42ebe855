"""VisualBERT: one Transformer over the words and the regions of a pair, which differs from UNITER in how a region is embedded.

Li et al., arXiv 1908.03557, as Hugging Face has it. It offers IAIS the four relation blocks of its last layer, as UNITER does
(docs/methods/iais.md#other-architectures).
"""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn
from transformers import BertConfig, VisualBertModel
from transformers.models.bert.modeling_bert import BertEmbeddings

from itm.matchers.joint.uniter import UNITER, UNITEROptions

OWN = ("visual_projection", "visual_position_embeddings", "visual_token_type_embeddings")  # the rest of the embeddings is BERT's


class VisualBERT(UNITER):
    """`path`: hub name or folder of a VisualBERT, whose sizes and weights are taken; else random weights. Options: those of `UNITER`.

    The rank head is a new one: the head of the pre-training judges pairs of captions.
    """

    kind: ClassVar[str] = "visual_bert"
    needs_boxes: ClassVar[bool] = False

    def __init__(self, *, vocab_size: int, path: str | None = None, **options: Unpack[UNITEROptions]) -> None:
        """Raises ValueError as `UNITER`, for another vocabulary than that of `path`, and for weights that are not all VisualBERT's."""
        loaded = None if path is None else VisualBertModel.from_pretrained(path, dtype=torch.float32)
        super().__init__(vocab_size=vocab_size, **(options if loaded is None else {**options, **_sizes(loaded, vocab_size)}))
        if loaded is not None:
            self.uniter.load_state_dict({_our_name(name): value for name, value in loaded.state_dict().items()})

    @staticmethod
    def region_embeddings(config: BertConfig, region_dim: int) -> nn.Module:
        return RegionEmbeddings(config, region_dim)


class RegionEmbeddings(nn.Module):
    """regions (N,R,D) -> LN(W f + b + position 0 + type 1), dropout, with the names of Hugging Face's state dict. Norm and dropout are
    those of the text; boxes are not read."""

    def __init__(self, config: BertConfig, region_dim: int) -> None:
        super().__init__()
        self.visual_projection = nn.Linear(region_dim, config.hidden_size)
        self.visual_position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.visual_token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)

    def forward(self, regions: Tensor, boxes: Tensor | None, text: BertEmbeddings) -> Tensor:
        place, kind = self.visual_position_embeddings.weight[0], self.visual_token_type_embeddings.weight[1]
        return text.dropout(text.LayerNorm(self.visual_projection(regions) + place + kind))


def _sizes(model: VisualBertModel, vocab_size: int) -> UNITEROptions:
    """Raises ValueError for another vocabulary, and for what this matcher has not."""
    config = model.config
    if config.vocab_size < vocab_size:
        raise ValueError(f"this VisualBERT knows {config.vocab_size} words, the tokenizer {vocab_size}: set text.path to its own tokenizer")
    if config.bypass_transformer or config.hidden_act != "gelu":
        raise ValueError("this VisualBERT bypasses its layers for regions, or has another activation than gelu, which no layer here does")
    return {
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "intermediate": config.intermediate_size,
        "positions": config.max_position_embeddings,
        "dropout": config.hidden_dropout_prob,
        "region_dim": config.visual_embedding_dim,
    }


def _our_name(name: str) -> str:
    room, _, rest = name.partition(".")
    return f"img_embeddings.{rest}" if room == "embeddings" and rest.startswith(OWN) else name
