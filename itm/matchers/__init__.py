"""Matchers by kind. A new model costs one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from itm.kinds import Kinds

if TYPE_CHECKING:
    from itm.types import Matcher

MATCHERS: Kinds[Matcher] = Kinds(
    "itm.types:Matcher",
    {
        "dual": "itm.matchers.dual:DualEncoder",
        "clip": "itm.matchers.clip:CLIP",
        "hf_dual": "itm.matchers.hf_dual:HFDual",
        "scan": "itm.matchers.late.scan:SCAN",
        "sgr": "itm.matchers.late.sgraf:SGR",
        "saf": "itm.matchers.late.sgraf:SAF",
        "sgraf": "itm.matchers.late.sgraf:SGRAF",
        "uarda": "itm.matchers.late.uarda:UARDA",
        "uniter": "itm.matchers.joint.uniter:UNITER",
        "mean": "itm.matchers.mean:Mean",
        "visual_bert": "itm.matchers.joint.visual_bert:VisualBERT",
    },
)
