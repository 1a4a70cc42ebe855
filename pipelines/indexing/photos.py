"""A plain folder of photos, packed so that it can be indexed."""

from __future__ import annotations

from itm.data import files


def packed_photos(photos: str, root: str) -> list[str]:
    """The folders of the splits, packed below `root`; what was added to the photos since goes to new shards.

    Raises ValueError as `itm pack`, and for a folder without a photo.
    """
    from itm.config import parse_recipe
    from pipelines.pack import pack

    data = {"root": root, "source": {"kind": "imagefolder", "options": {"path": photos}}, "max_reject_rate": 1.0}
    recipe = parse_recipe({"name": "photos", "output": root, "data": data, "model": {"kind": "dual"}})
    return [files.join(root, split) for split in pack(recipe)]
