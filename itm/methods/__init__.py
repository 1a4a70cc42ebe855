"""Training methods by kind: `method(batch) -> {name: weighted loss}`. A new method costs one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from itm.kinds import Kinds

if TYPE_CHECKING:
    from itm.types import Method

METHODS: Kinds[Method] = Kinds(
    "itm.types:Method",
    {
        "matching": "itm.methods.matching:Matching",
        "cusa": "itm.methods.cusa:CUSA",
        "iais": "itm.methods.iais:IAIS",
    },
)
