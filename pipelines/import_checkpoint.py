"""Turn an authors' checkpoint into a matcher folder that evaluates, fine-tunes and registers like our own.

    itm import model_best.pth.tar --vocab f30k_precomp_vocab.json -o matchers/sgr-f30k     SCAN, SGR, SAF
    itm import uniter-base.pt --tokenizer bert-base-cased -o matchers/uniter               UNITER, IAIS
    itm import ViT-B-32.pt --tokenizer bpe_simple_vocab_16e6.txt.gz -o matchers/clip       CLIP, CUSA

The family is found out from the keys. Pickles are read without running code; a file that holds anything but tensors and plain
values is refused. What the file does not say is given as name=value, e.g. cross_attn=t2i or heads=12.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import HFTokenizer, WordVocabulary
from itm.importers.load import load_official
from itm.matchers.folder import save_matcher
from itm.types import Matcher

MAX_LENGTH = {"uniter": 60, "clip": 77}
"""Tokens a caption, start and end included. SCAN and SGRAF never cut a caption; 256 is beyond any."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("needed", nargs="*", metavar="name=value", help="what the file does not say, e.g. cross_attn=t2i heads=12")
    parser.add_argument("--vocab", type=Path, help="vocabulary json that belongs to SCAN or SGRAF weights")
    parser.add_argument("--tokenizer", help="Hugging Face tokenizer (name or folder) or CLIP merges file, for UNITER and CLIP")
    parser.add_argument("-o", "--output", required=True, help="matcher folder to write")


def run(args: argparse.Namespace) -> int:
    needed = {}
    for pair in args.needed:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is not of the form name=value")
        needed[name] = yaml.safe_load(value)
    matcher = import_checkpoint(args.checkpoint, args.output, vocab=args.vocab, tokenizer=args.tokenizer, **needed)
    weights = sum(p.numel() for p in matcher.parameters())
    print(f"{args.output}: {type(matcher).__name__}, {weights:,} weights; try: itm evaluate --matcher {args.output}")
    return 0


def import_checkpoint(
    checkpoint: str | Path, output: str | Path, *, vocab: str | Path | None = None, tokenizer: str | None = None, **needed: Any
) -> Matcher:
    """Read, check and write; returns the matcher with its `inputs`.

    Raises ValueError as `load_official`, and when the vocabulary is missing or of another size than the weights.
    """
    matcher = load_official(checkpoint, **needed)
    kind = matcher.kind
    words = _word_embeddings(matcher)
    reader = _tokenizer(kind, vocab, tokenizer)
    if reader.vocab_size > words or (kind not in MAX_LENGTH and reader.vocab_size != words):
        raise ValueError(f"{vocab or tokenizer} has {reader.vocab_size} words, {checkpoint} embeds {words}: give its own file")
    matcher.inputs = Inputs(_image_input(matcher), reader)
    save_matcher(matcher, output)
    return matcher


def _tokenizer(kind: str, vocab: str | Path | None, tokenizer: str | None) -> Any:
    if kind in MAX_LENGTH:
        if tokenizer is None:
            raise ValueError(f"a {kind} checkpoint needs --tokenizer: the Hugging Face tokenizer (or CLIP merges file) it was trained with")
        return HFTokenizer(tokenizer, max_length=MAX_LENGTH[kind], clean=False)
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


if __name__ == "__main__":
    import sys

    from pipelines.cli import stage_main

    sys.exit(stage_main("import"))
