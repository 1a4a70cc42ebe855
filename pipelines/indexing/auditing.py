"""The pages of `itm index --report`: computed from an index, with pictures from its shards."""

from __future__ import annotations

from itm.data import files
from itm.report.audit_page import captions_page, duplicates_page, reach_page
from itm.report.thumbnails import data_uri
from itm.retrieval.audit import duplicates, reach_and_fit
from itm.retrieval.index import Index


def audit(index: Index, folder: str, alike: float) -> list[str]:
    """Write duplicates.html and, of an index with captions, reach.html and captions.html; returns what they say, a line each.

    Raises ValueError as `duplicates`.
    """

    def photo(row: int) -> str:
        try:
            sample = index.sample(index.names.image_keys[row])
            return data_uri(sample.image) if sample.image else ""
        except (OSError, ValueError):  # shards that are elsewhere, or a photo that cannot be decoded: the page shows the key
            return ""

    same = duplicates(index, alike)
    pages = {"duplicates.html": duplicates_page(index, same, photo)}
    leaked = sum(len(group.rows) for group in same.across)
    over = f"{len(same.across):,} over several splits, with {leaked:,} images"
    lines = [f"{len(same.groups):,} groups of near duplicates (cosine {alike:g}), {over}"]
    if len(index.captions):
        reach, fit = reach_and_fit(index)
        pages |= {"reach.html": reach_page(index, reach, photo), "captions.html": captions_page(index, fit, photo)}
        lines.append(f"{len(reach.never):,} of {len(reach.rows):,} images are never found, {len(reach.hubs):,} ten times too often")
        lines.append(f"{len(fit.misfits):,} of {fit.captions:,} captions fit another image better than their own")
    for name, page in pages.items():
        files.write_atomic(files.join(folder, name), page.encode())
    return [*lines, ", ".join(files.join(folder, name) for name in pages)]
