"""COCO caption annotations: captions_{split}.json with `images` and `annotations`."""

from __future__ import annotations

from itm.data.sources.source import ListedImages, Listing, caption_of, field_of, paths_by_split, read_json


class CocoCaptions(ListedImages):
    """`path`: a file name with `{split}` or a mapping split: file; `image_root` may hold `{split}` (`coco/{split}2017`).

    Raises ValueError when a file is not of this format (row and field named), annotates an image that it does not list, or gives two
    images one id.
    """

    def __init__(self, path: str | dict[str, str], image_root: str = ".") -> None:
        paths = paths_by_split(path)
        super().__init__(image_root, {split: _listings(p) for split, p in paths.items()}, paths.values())


def _listings(path: str) -> list[Listing]:
    coco = read_json(path)
    if not isinstance(coco, dict) or not {"images", "annotations"} <= coco.keys():
        raise ValueError(f"{path} is no COCO caption file: it needs `images` and `annotations`")
    listings: dict[object, Listing] = {}
    for number, image in enumerate(coco["images"]):
        where = f"{path} image {number}"
        image_id, name = field_of(image, "id", where), field_of(image, "file_name", where)
        if image_id in listings and listings[image_id].path != name:
            raise ValueError(
                f"{path}: the image id {image_id} is of {listings[image_id].path} and of {name}; give each image an id of its own "
                "(files that were merged keep the ids of their sources)"
            )
        listings.setdefault(image_id, Listing(name, meta={"image_id": image_id}))
    for number, row in enumerate(coco["annotations"]):
        where = f"{path} annotation {number}"
        caption_id, image_id = field_of(row, "id", where), field_of(row, "image_id", where)
        if image_id not in listings:
            raise ValueError(f"{path}: annotation {caption_id} is of image {image_id}, which the file does not list")
        if "bbox" in row and "caption" not in row:
            raise ValueError(f"{where} is an object with a box and has no `caption`: give captions_*.json in place of instances_*.json")
        listings[image_id].captions.append(caption_of(field_of(row, "caption", where), where, str(caption_id)))
    return list(listings.values())
