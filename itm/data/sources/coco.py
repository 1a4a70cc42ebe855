"""COCO caption annotations: captions_{split}.json with `images` and `annotations`."""

from __future__ import annotations

from pathlib import Path

from itm.data.records import Caption
from itm.data.sources.source import ListedImages, Listing, paths_by_split, read_json


class CocoCaptions(ListedImages):
    """`path`: a file name with `{split}` or a mapping split: file; `image_root` may hold `{split}` (`coco/{split}2017`).

    Raises ValueError when a file is not of this format or annotates an image that it does not list.
    """

    def __init__(self, path: str | dict[str, str], image_root: str = ".") -> None:
        paths = paths_by_split(path)
        super().__init__(image_root, {split: _listings(p) for split, p in paths.items()}, paths.values())


def _listings(path: Path) -> list[Listing]:
    coco = read_json(path)
    if not isinstance(coco, dict) or not {"images", "annotations"} <= coco.keys():
        raise ValueError(f"{path} is no COCO caption file: it needs `images` and `annotations`")
    listings = {image["id"]: Listing(image["file_name"], meta={"image_id": image["id"]}) for image in coco["images"]}
    for row in coco["annotations"]:
        if row["image_id"] not in listings:
            raise ValueError(f"{path}: annotation {row['id']} is of image {row['image_id']}, which the file does not list")
        listings[row["image_id"]].captions.append(Caption(str(row["id"]), row["caption"]))
    return list(listings.values())
