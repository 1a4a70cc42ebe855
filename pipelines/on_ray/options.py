"""The choices of `itm evaluate` about scoring. No torch here: the command line shows them."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from itm.arguments import read_from
from itm.evaluation import PRECISIONS
from itm.matchers.late import Prune

if TYPE_CHECKING:
    from itm.data.formats import Json


@dataclass(frozen=True)
class How:
    """The choices of `itm evaluate` about scoring.

    block: images per score tile, unset = from the memory budget. screen: candidates of every image and caption, `auto` = as many as keep
    the loss of recall below `screen_loss` (a share) on `screen_queries` random queries; screen_matcher: whose vectors propose them.
    """

    precision: str = "fp32"
    compile: bool = False
    block: int | None = None
    distributed: bool = False
    prune: Prune = "off"
    screen: str | None = None
    screen_loss: float = 0.02
    screen_queries: int = 500
    screen_matcher: str | None = None
    eval_threshold: str | float | None = None

    def __post_init__(self) -> None:
        if self.screen is not None and self.screen != "auto" and not (self.screen.isdigit() and int(self.screen)):
            raise ValueError(f"--screen takes a number of candidates or auto, not {self.screen!r}")
        if not (0 < self.screen_loss < 1 and self.screen_queries > 0):
            raise ValueError("--screen-loss is a share between 0 and 1, --screen-queries at least 1")
        if self.eval_threshold is not None and threshold_of(str(self.eval_threshold)) is None:
            raise ValueError(f"--eval-threshold takes t, t_safe or a number, not {self.eval_threshold!r}")
        if self.screen and self.distributed:
            raise ValueError("--screen scores a few pairs in this process, --distributed all pairs in tiles: choose one of them")

    @classmethod
    def of(cls, args: argparse.Namespace) -> How:
        return cls(**{name: getattr(args, name) for name in cls.__dataclass_fields__ if name != "block"})

    def identity(self, screener: str | None = None) -> Json:
        """What tells this result from that of the exact scores of record. screener: hash of the weights of `screen_matcher`."""
        pruned = {} if self.prune == "off" else {"prune": self.prune}
        fused = {"compile": True} if self.compile else {}
        screened = {"screened": [self.screen, self.screen_loss, self.screen_queries, screener]} if self.screen else {}
        cut = {} if self.eval_threshold is None else {"eval_threshold": threshold_of(str(self.eval_threshold))}
        return {"precision": self.precision} | pruned | fused | screened | cut

    @property
    def of_record(self) -> bool:
        """Whether the result is that of the matcher as it is, neither approximate nor at another threshold."""
        return not self.screen and self.eval_threshold is None

    def named(self, name: str) -> str:
        """The name of a result, marked when it is not of record: it never stands where that would."""
        marks = ("-screened" if self.screen else "") + ("" if self.eval_threshold is None else f"-threshold-{self.eval_threshold}")
        return re.sub(r"(\.json)?$", lambda found: marks + (found[1] or ""), name, count=1)


def threshold_of(said: str) -> str | float | None:
    """t, t_safe or a finite number; None when it is none of them."""
    if said in ("t", "t_safe"):
        return said
    try:
        return value if math.isfinite(value := float(said)) else None
    except ValueError:
        return None


IN_MEMORY = How()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="fp32 is the score of record")
    parser.add_argument("--compile", action="store_true", help="torch.compile what SCAN, SGR, SAF and UARDA do to a tile")
    parser.add_argument("--distributed", action="store_true", help="score by Ray actors into a store of tiles, small splits as well")
    parser.add_argument("--prune", choices=get_args(Prune), default="off", help="UARDA: skip fragments below the threshold; same scores")
    parser.add_argument(
        "--eval-threshold", metavar="T", help="UARDA: score with this threshold: t, t_safe or a number (default: the matcher's own)"
    )
    parser.add_argument("--screen", metavar="K|auto", help="score only the K candidates a side that vectors propose (approximate)")
    parser.add_argument(
        "--screen-loss", type=float, default=0.02, metavar="SHARE", help="with --screen auto: queries that may lose their hit"
    )
    parser.add_argument("--screen-queries", type=int, default=500, metavar="N", help="random queries on which the loss is measured")
    parser.add_argument(
        "--screen-matcher", metavar="URI", type=read_from, help="a matcher whose vectors screen (default: the matcher's own pooled vectors)"
    )
