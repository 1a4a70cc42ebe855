"""The sums of a folder of shards that was written, as the last lines of a stage state them."""

from __future__ import annotations

import json

from itm.data import files
from itm.data.manifest import QUARANTINE, Manifest, rejected_captions


def others_passed_over(folder: str) -> int:
    """How many files of the source were no items, by the quarantine of a split."""
    uri = files.join(folder, QUARANTINE)
    rows = files.read_bytes(uri).decode().split("\n") if files.exists(uri) else []
    return sum(bool(row) and json.loads(row)["what"] == "member" for row in rows)


def kept_and_lost(manifest: Manifest, folder: str) -> str:
    """Both sums of a folder that was written, as the last line of a stage states them."""
    images, captions, lost = manifest.samples, manifest.captions, rejected_captions(folder)
    return (
        f"{images + manifest.rejected:,} images = {images:,} kept + {manifest.rejected:,} rejected, "
        f"{captions + lost:,} captions = {captions:,} kept + {lost:,} rejected"
    )
