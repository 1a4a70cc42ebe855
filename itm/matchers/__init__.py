"""Matchers by kind. A new model costs one file and one line here."""

MATCHERS = {
    "dual": "itm.matchers.dual:DualEncoder",
    "clip": "itm.matchers.clip:CLIP",
    "scan": "itm.matchers.late.scan:SCAN",
    "sgr": "itm.matchers.late.sgraf:SGR",
    "saf": "itm.matchers.late.sgraf:SAF",
    "uarda": "itm.matchers.late.uarda:UARDA",
    "uniter": "itm.matchers.joint.uniter:UNITER",
}
