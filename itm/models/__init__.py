"""Matchers by kind. A new model costs one file and one line here."""

MODELS = {
    "dual": "itm.models.dual:DualEncoder",
    "clip": "itm.models.clip:CLIP",
    "scan": "itm.models.scan:SCAN",
    "sgr": "itm.models.sgraf:SGR",
    "saf": "itm.models.sgraf:SAF",
    "uarda": "itm.models.uarda:UARDA",
    "uniter": "itm.models.uniter:UNITER",
}
