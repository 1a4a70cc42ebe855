"""Scoring speed against the published loops of SCAN, SGRAF and NAAF, and the time of a COCO 5K evaluation, measured here and now.

    itm bench                                          # everything, one CPU thread
    itm bench scoring --kinds SGR SAF --rounds 7 --json bench.json --plot bench.svg
    itm bench scoring --device cuda --images 1000 --captions 5000 --every 100
    itm bench pruning --captions 1000                  # UARDA with and without pruning, at several shares of pruned words

Needs `itm/` only: `python -m itm.benchmarks.scoring` is the same.
"""

from __future__ import annotations

import argparse

from itm.benchmarks.arguments import add_arguments
from pipelines.cli import script

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    from itm.benchmarks import scoring

    return scoring.run(args)


if __name__ == "__main__":
    script(__file__)
