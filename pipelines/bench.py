"""Scoring speed against the published loops of SCAN, SGRAF and NAAF, and the time of a COCO 5K evaluation, measured here and now.

    itm bench                                          # both, one CPU thread
    itm bench scoring --kinds SGR SAF --rounds 7 --json bench.json --plot bench.svg
    itm bench scoring --device cuda --images 1000 --captions 5000 --every 100

Needs `itm/` only: `python -m itm.benchmarks.scoring` is the same.
"""

from itm.benchmarks.scoring import add_arguments, run

__all__ = ["add_arguments", "run"]

if __name__ == "__main__":
    import sys

    from pipelines.cli import stage_main

    sys.exit(stage_main("bench"))
