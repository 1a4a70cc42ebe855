"""An authors' checkpoint as a matcher folder: weights, and the preparation they were trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from itm.data import files
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import HFTokenizer, WordVocabulary
from itm.importers.load import load_official
from itm.matchers.folder import save_matcher
from itm.types import Matcher

MAX_LENGTH = {"uniter": 62, "clip": 77}
"""Tokens a caption, start and end included (IAIS counts its 60 word pieces without them). SCAN and SGRAF never cut a caption; 256 is
beyond any."""

RELEASED = {("uniter", 28996): "bert-base-cased", ("clip", 49408): "CLIP's own tokenizer (bpe_simple_vocab_16e6.txt.gz)"}
"""(kind, words that the weights embed) -> the tokenizer of the released weights; one with fewer words would read others in their place."""


def import_checkpoint(
    checkpoint: str | Path, output: str | Path, *, vocab: str | Path | None = None, tokenizer: str | None = None, **needed: Any
) -> Matcher:
    """Read, check and write; returns the matcher with its `inputs`.

    Raises ValueError as `load_official`, and when the vocabulary is missing or of another size than the weights.
    """
    vocab = None if vocab is None else files.absolute(vocab)
    matcher = load_official(checkpoint, **needed)
    kind = matcher.kind
    words = _word_embeddings(matcher)
    reader = _tokenizer(kind, vocab, tokenizer, clean=_is_cusa(matcher))
    exact = kind not in MAX_LENGTH or (kind, words) in RELEASED
    if reader.vocab_size > words or (exact and reader.vocab_size != words):
        own = RELEASED.get((kind, words), "its own file")
        raise ValueError(f"{vocab or tokenizer} has {reader.vocab_size} words, {checkpoint} embeds {words}: give {own}")
    matcher.inputs = Inputs(_image_input(matcher), reader)
    save_matcher(matcher, output)
    return matcher


def _is_cusa(matcher: Matcher) -> bool:
    """CUSA's checkpoints are CLIP with projection heads of their own; their captions were cleaned up."""
    return matcher.kind == "clip" and any(name.startswith("image_heads.") for name, _ in matcher.named_parameters())


def _tokenizer(kind: str, vocab: str | Path | None, tokenizer: str | None, clean: bool) -> Any:
    if kind in MAX_LENGTH:
        if tokenizer is None:
            raise ValueError(f"a {kind} checkpoint needs --tokenizer: the Hugging Face tokenizer (or CLIP merges file) it was trained with")
        return HFTokenizer(tokenizer, max_length=MAX_LENGTH[kind], clean=clean)
    if vocab is None:
        raise ValueError(f"a {kind} checkpoint needs --vocab: the order of its words is arbitrary, it must travel with the weights")
    return WordVocabulary.from_json(vocab, max_length=256, clean=False)


def _word_embeddings(matcher: nn.Module) -> int:
    """Rows of the word embedding: the largest embedding of the text side."""
    return max(module.num_embeddings for module in matcher.modules() if isinstance(module, nn.Embedding))


def _image_input(matcher: Matcher) -> ImageInput:
    if matcher.image_size is not None:
        return ImageInput(kind="pixels", size=matcher.image_size, crop="center")
    return ImageInput(kind="regions", max_regions=matcher.regions)
