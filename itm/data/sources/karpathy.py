"""The Karpathy splits: dataset_flickr8k.json, dataset_flickr30k.json, dataset_coco.json."""

from __future__ import annotations

from itm.data import files
from itm.data.records import Caption
from itm.data.sources.source import ListedImages, Listing, caption_of, field_of, read_json


class Karpathy(ListedImages):
    """`restval` (COCO) joins train, as every retrieval paper does, unless `restval_in_train=False`; then it is a split of its own.

    Images lie in `image_root`[/filepath]/filename. Captions are the raw sentences, their ids the sentids;
    image_id is the cocoid, else the imgid.
    Raises ValueError when the file is not of this format, naming image and field.
    """

    def __init__(self, path: str, image_root: str = ".", restval_in_train: bool = True) -> None:
        file = files.absolute(path)
        dataset = read_json(file)
        if not isinstance(dataset, dict) or not dataset.get("images"):
            raise ValueError(f"{path} is no Karpathy split file: it has no `images`")
        self.restval_in_train = restval_in_train
        listings: dict[str, list[Listing]] = {}
        for number, image in enumerate(dataset["images"]):
            where = f"{path} image {number}"
            chosen, filename, imgid = (field_of(image, name, where) for name in ("split", "filename", "imgid"))
            split = "train" if chosen == "restval" and restval_in_train else chosen
            name = "/".join(filter(None, (image.get("filepath"), filename)))
            captions = [_caption(s, f"{where} sentence {n}") for n, s in enumerate(field_of(image, "sentences", where))]
            meta = {"image_id": image.get("cocoid", imgid), "imgid": imgid}
            listings.setdefault(split, []).append(Listing(name, captions, meta))
        super().__init__(image_root, listings, [file])

    def identity(self) -> dict[str, object]:
        return super().identity() | {"restval_in_train": self.restval_in_train}


def _caption(sentence: object, where: str) -> Caption:
    return caption_of(field_of(sentence, "raw", where), where, str(field_of(sentence, "sentid", where)))
