"""The arguments of `itm bench`. No torch here: the command line shows them."""

from __future__ import annotations

import argparse

from itm.arguments import written_to

KINDS = ("SCAN t2i", "SCAN i2t", "SGR", "SAF", "UARDA")
WHATS = ("scoring", "metrics", "pruning", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        choices=WHATS,
        default="all",
        help="scoring against published loops, metrics at COCO 5K size, UARDA with and without pruning",
    )
    parser.add_argument("--images", type=int, default=100, help="images that are scored")
    parser.add_argument("--captions", type=int, default=500, help="captions that are scored")
    parser.add_argument("--every", type=int, default=5, help="the peer scores every n-th caption: by default 100 x 100, as published")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median is shown")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="matchers that are timed (default: all)")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile; the first round, which is not timed, compiles")
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    parser.add_argument("--json", metavar="FILE", type=written_to, help="also write every figure")
    parser.add_argument("--plot", metavar="SVG", help="also draw the ratios")
