"""Late-interaction matchers that are wide enough for rounding to matter."""

from __future__ import annotations

from typing import Any

from itm.matchers.late.scan import SCAN
from itm.matchers.late.sgraf import SAF, SGR
from itm.matchers.late.uarda import UARDA

WIDE: dict[str, Any] = {"vocab_size": 20, "image": {"in_width": 7, "width": 64}, "text": {"word_dim": 6, "width": 64, "dropout": 0.0}}


KINDS = [
    (SCAN, {}),
    (SCAN, {"cross_attn": "i2t", "agg_func": "Mean"}),
    (SGR, {"sim_dim": 32, "regions": 5}),
    (SAF, {"sim_dim": 32, "regions": 5}),
    (UARDA, {"eval_threshold": -1.0, "direction": "both"}),
]
