"""Turn an authors' checkpoint into a matcher folder that evaluates, fine-tunes and registers like our own.

    itm import model_best.pth.tar --vocab f30k_precomp_vocab.json -o matchers/sgr-f30k     SCAN, SGR, SAF
    itm import uniter-base.pt --tokenizer bert-base-cased -o matchers/uniter               UNITER, IAIS
    itm import ViT-B-32.pt --tokenizer bpe_simple_vocab_16e6.txt.gz -o matchers/clip       CLIP, CUSA

The family is found out from the keys. Pickles are read without running code; a file that holds anything but tensors and plain
values is refused. What the file does not say is given as name=value, e.g. cross_attn=t2i or heads=12; of a CLIP the config.json beside
the file says it, else heads=12 (or heads=[12,8], vision and text) and hidden_act=gelu do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from itm.arguments import read_from, written_to
from pipelines.cli import script


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=read_from, help="file or folder of the released weights")
    parser.add_argument("needed", nargs="*", metavar="name=value", help="what the file does not say, e.g. cross_attn=t2i heads=12")
    parser.add_argument("--vocab", type=read_from, help="vocabulary json that belongs to SCAN or SGRAF weights")
    parser.add_argument(
        "--tokenizer", type=read_from, help="Hugging Face tokenizer (name or folder) or CLIP merges file, for UNITER and CLIP"
    )
    parser.add_argument("-o", "--output", required=True, type=written_to, help="matcher folder to write")


def run(args: argparse.Namespace) -> int:
    from itm.importers.checkpoint import import_checkpoint

    needed = {}
    for pair in args.needed:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is not of the form name=value")
        needed[name] = yaml.safe_load(value)
    matcher = import_checkpoint(
        Path(args.checkpoint), args.output, vocab=args.vocab and Path(args.vocab), tokenizer=args.tokenizer, **needed
    )
    weights = sum(p.numel() for p in matcher.parameters())
    print(f"{args.output}: {type(matcher).__name__}, {weights:,} weights; try: itm evaluate --matcher {args.output}")
    return 0


if __name__ == "__main__":
    script(__file__)
