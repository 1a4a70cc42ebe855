"""Models of two towers as Hugging Face stores them: random weights of a few thousand numbers, tokenizer and processor beside them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedModel, SiglipConfig, SiglipModel

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LONGEST, SIDE = 40, 32


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's without merges: a token a letter."""
    symbols = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    found = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=LONGEST)
    found.save_pretrained(folder)
    return found


def tiny(folder: Path, kind: str, seed: int = 0) -> PreTrainedModel:
    """kind: clip or siglip."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer(folder)
    torch.manual_seed(seed)
    ids = {
        "vocab_size": len(words),
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.bos_token_id,
        "pad_token_id": words.eos_token_id,
    }
    text, vision = {**TOWER, **ids, "max_position_embeddings": LONGEST}, {**TOWER, "image_size": SIDE, "patch_size": 16}
    if kind == "clip":
        model: PreTrainedModel = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    else:
        model = SiglipModel(SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(folder)
    size = {"shortest_edge": SIDE} if kind == "clip" else {"height": SIDE, "width": SIDE}
    said = {"do_center_crop": kind == "clip", "size": size, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return model
