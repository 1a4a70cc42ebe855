"""Weights of the released sizes take the tokenizer that they were released with, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertTokenizerFast, CLIPConfig, CLIPModel

from itm.importers.checkpoint import import_checkpoint
from itm.matchers.joint.uniter import UNITER
from tests.support.openai_names import openai_names


def uniter(words: int, path: Path) -> Path:
    state = UNITER(vocab_size=words, hidden=64, layers=1, heads=1, intermediate=16, positions=70, region_dim=6).state_dict()
    torch.save(state, path)
    return path


def clip(words: int, path: Path) -> Path:
    tower = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = tower | {"vocab_size": words, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    torch.save(openai_names(CLIPModel(config)), path)
    return path


def tokenizer(words: int, folder: Path) -> str:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{k}" for k in range(words - 5))]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("make", "released", "own"), [(uniter, 28996, "bert-base-cased"), (clip, 49408, "CLIP's own tokenizer")])
def test_another_vocabulary_is_refused_with_the_right_one(tmp_path: Path, make: object, released: int, own: str) -> None:
    assert callable(make)
    weights = make(released, tmp_path / "released.pt")
    for words in (40, 60000):
        with pytest.raises(ValueError, match=rf"has {words} words, \S+released\.pt embeds {released}: give {own}"):
            import_checkpoint(weights, tmp_path / "m", tokenizer=tokenizer(words, tmp_path / f"t{words}"))
    assert not (tmp_path / "m").exists()
    import_checkpoint(weights, tmp_path / "m", tokenizer=tokenizer(released, tmp_path / "t"))
    import_checkpoint(make(44, tmp_path / "own.pt"), tmp_path / "n", tokenizer=str(tmp_path / "t40"))  # some pad their embedding
