"""The `*_precomp` folders of SCAN, SGRAF and UARDA: `{split}_ims.npy` region features and `{split}_caps.txt`, five lines an image."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from itm.data import files
from itm.data.formats import Json
from itm.data.records import Caption, Problem, Record, Regions
from itm.data.sources.source import Source, read_text, refuse_pointer, stored_features, unique_keys


class Precomp(Source):
    """`{split}_ims.npy` (N,R,D), memory-mapped, holds each image once (1x) or once a caption (5x, as the published dev and test files do).

    `{split}_ids.txt` (or `_imagename.txt`), one id an image or one a row, names the images where it exists. There are no boxes.
    Raises ValueError when the numbers of rows and captions do not fit together.
    """

    def __init__(self, path: str, captions_per_image: int = 5) -> None:
        self.path, self.per_image = Path(files.absolute(path)), captions_per_image
        self.splits = self._complete_splits()
        if not self.splits:
            raise ValueError(f"no {{split}}_ims.npy with {{split}}_caps.txt in {path}")
        self._splits = {split: self._open(split) for split in self.splits}

    def _complete_splits(self) -> list[str]:
        """Raises ValueError for a split of which only the features or only the captions are there: it would be left out unseen."""
        with_features, with_captions = ({p.name.removesuffix(end) for p in self.path.glob(f"*{end}")} for end in ("_ims.npy", "_caps.txt"))
        for split in sorted(with_features ^ with_captions):
            there, missing = ("ims.npy", "caps.txt") if split in with_features else ("caps.txt", "ims.npy")
            raise ValueError(f"{self._file(split, there)} is there and {split}_{missing} is not: put it beside it, or move the other away")
        return sorted(with_features)

    def count(self, split: str) -> int:
        return len(self._splits[split][2])

    def identity(self) -> Json:
        """The features are known by shape and by their first and last image: hashing them whole would take minutes."""
        digests = {}
        for split, (features, captions, keys, _) in self._splits.items():
            digest = hashlib.sha256("\n".join([*captions, *keys, str(features.shape)]).encode())
            digest.update(features[0].tobytes() + features[-1].tobytes())
            digests[split] = digest.hexdigest()
        return {"source": "Precomp", "captions_per_image": self.per_image, "splits": digests}

    def item(self, split: str, index: int) -> Record | Problem:
        features, captions, keys, step = self._splits[split]
        rows = features[index * step : (index + 1) * step]
        if (rows[1:] != rows[:1]).any():
            reason = f"{split}_ims.npy rows {index * step} to {(index + 1) * step - 1} should be the same image"
            return Problem(keys[index], "", "source", reason, captions=self.per_image)
        try:
            kept = stored_features(rows[0], self.regions_dtype)
        except ValueError as error:
            return Problem(keys[index], "", "source", f"{split}_ims.npy row {index * step} is {error}", captions=self.per_image)
        first = index * self.per_image
        texts = captions[first : first + self.per_image]
        said = [Caption(f"{split}-{first + n}", text) for n, text in enumerate(texts)]
        return Record(keys[index], split, said, regions=Regions(kept), meta={"image_id": keys[index]})

    def _file(self, split: str, name: str) -> Path:
        return self.path / f"{split}_{name}"

    def _open(self, split: str) -> tuple[np.ndarray, list[str], list[str], int]:
        """(features, captions, key of each image, rows an image)."""
        features = _load(self._file(split, "ims.npy"))
        captions = self._lines(split, "caps.txt")
        images, odd = divmod(len(captions), self.per_image)
        if features.ndim != 3 or odd or len(features) not in (images, len(captions)):
            raise ValueError(
                f"{self.path}: {split}_ims.npy is {features.shape} and {split}_caps.txt has {len(captions)} lines; "
                f"with captions_per_image={self.per_image} the features should be ({images} or {len(captions)}, R, D)"
            )
        step = len(features) // images
        return features, captions, self._keys(split, images, step), step

    def _keys(self, split: str, images: int, step: int) -> list[str]:
        for name in ("ids.txt", "imagename.txt"):
            if self._file(split, name).exists():
                ids = self._lines(split, name)
                if len(ids) not in (images, images * step):
                    raise ValueError(f"{self._file(split, name)} has {len(ids)} lines for {images} images")
                return unique_keys(ids[:: len(ids) // images])
        return [f"{split}-{index:06d}" for index in range(images)]

    def _lines(self, split: str, name: str) -> list[str]:
        return read_text(self._file(split, name)).removesuffix("\n").split("\n")


def _load(path: Path) -> np.ndarray:
    """Memory-mapped. Raises ValueError naming the file and what it is instead."""
    with path.open("rb") as stream:
        start = stream.read(64)
    refuse_pointer(path, start)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.ndarray):
            return array
        what = "is an archive of arrays"
    except Exception:  # numpy raises almost anything for what is no array
        what = "is no .npy file" if not start.startswith(b"\x93NUMPY") else "is cut short, or holds objects instead of numbers"
    raise ValueError(f"{path} {what}: write it with numpy.save, as float32 or float16")
