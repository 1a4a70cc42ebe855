"""`features.json` of a split of region shards: of which encoder, and of photos prepared how, its features are."""

from __future__ import annotations

from itm.data import files
from itm.data.formats import Json, read_json

CLAIM, FORMAT = "features.json", 1


def read_claim(folder: str) -> Json | None:
    """None for a split whose regions `itm features` did not make. Raises NewerFormat."""
    uri = files.join(folder, CLAIM)
    return read_json(uri, FORMAT) if files.exists(uri) else None
