"""Training methods by kind: `method(batch) -> {name: weighted loss}`. A new method costs one file and one line here."""

METHODS = {
    "matching": "itm.methods.matching:Matching",
    "cusa": "itm.methods.cusa:CUSA",
    "iais": "itm.methods.iais:IAIS",
}
