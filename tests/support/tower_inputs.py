"""Configurations of small Hugging Face towers, and random pixels and tokens for them."""

from __future__ import annotations

import torch

from itm.types import Captions, Images

VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}


BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def images(rows=3, size=64):
    return Images(torch.arange(rows), pixels=torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8))


def captions(rows=3, length=6, vocab=20):
    mask = torch.arange(length) < torch.randint(2, length + 1, (rows, 1))
    mask[0] = True
    return Captions(torch.randint(4, vocab, (rows, length)) * mask, mask, torch.arange(rows))
