"""UNITER's databases: image LMDB (msgpack of arrays, or npz) and text LMDB (msgpack in LZ4 frames), as published for its retrieval tasks.

`tensors` and `input_ids` give what the authors' reader gives. As a `Source`, boxes are relative to the image (width = height = 1).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import pyarrow as pa

from itm.data import files
from itm.data.formats import Json
from itm.data.records import Caption, Problem, Record, Regions
from itm.data.sources.source import Source, read_json, unique_keys

Annotation = dict[str, Any]
"""What a text database holds of a caption, as msgpack gives it: `input_ids`, `img_fname` and whatever the authors kept."""
TEXT_FIELDS = ("raw", "sentence", "caption", "text")


class UniterDb(Source):
    """`texts` = {split: folder of a text database, or several (COCO: train and restval)}, `images` = folder of an image database, or
    several (COCO: train2014 and val2014).

    A caption is the annotation's own text where the database kept it, else its word pieces joined by `vocab` (the vocab.txt of
    bert-base-cased, which is read where it is needed only).
    Raises ValueError for a folder that is no database, for an image that two of the image databases hold, for a text that two images claim,
    and when there is neither text nor `vocab`.
    """

    def __init__(self, texts: dict[str, str | list[str]], images: str | list[str], vocab: str | None = None) -> None:
        self.images = [ImageDatabase(Path(files.absolute(folder))) for folder in _several(images)]
        _check_once(self.images)
        self.texts = {split: [TextDatabase(Path(files.absolute(f))) for f in _several(given)] for split, given in texts.items()}
        self.splits = list(self.texts)
        self._rows = {split: [(name, db) for db in held for name in db.captions_of] for split, held in self.texts.items()}
        self._keys = {split: unique_keys([name for name, _ in rows]) for split, rows in self._rows.items()}
        bare = [(split, db) for split, held in self.texts.items() for db in held if not db.has_text()]
        if bare and vocab is None:
            split, db = bare[0]
            raise ValueError(f"{db.folder} keeps word pieces only (split {split}): give vocab=<vocab.txt of bert-base-cased>")
        self.pieces = _pieces(vocab) if bare and vocab is not None else None

    def count(self, split: str) -> int:
        return len(self._rows[split])

    def identity(self) -> Json:
        """Databases are known by their index files and sizes: hashing tens of GB would take minutes."""
        return {
            "source": "UniterDb",
            "texts": {split: "+".join(db.digest() for db in held) for split, held in self.texts.items()},
            "images": [db.digest() for db in self.images],
        }

    def item(self, split: str, index: int) -> Record | Problem:
        (name, texts), key = self._rows[split][index], self._keys[split][index]
        found = next((db for db in self.images if name in db), None)
        if found is None:
            reason = f"{name} is in no image database: {', '.join(str(db.folder) for db in self.images)}"
            return Problem(key, "", "source", reason, captions=len(texts.captions_of[name]))
        try:
            arrays = found.arrays(name)
            regions = Regions(arrays["features"], arrays["norm_bb"][:, :4].astype(np.float32), 1, 1, _flat(arrays.get("conf")))
            captions = [Caption(text_id, self._text(texts.annotation(text_id))) for text_id in texts.captions_of[name]]
        except ValueError as error:
            return Problem(key, "", "source", f"{name}: {error}", captions=len(texts.captions_of[name]))
        return Record(key, split, captions, regions=regions, meta={"image_id": key, "filename": name})

    def _text(self, annotation: Annotation) -> str:
        own = _own_text(annotation)
        if own or self.pieces is None:
            return own
        try:
            return " ".join(self.pieces[i] for i in annotation["input_ids"]).replace(" ##", "")
        except IndexError:
            raise ValueError(f"word piece {max(annotation['input_ids'])} is beyond the {len(self.pieces)} lines of vocab") from None


def _check_once(databases: list[ImageDatabase]) -> None:
    """Raises ValueError naming an image that two databases hold, or one lists twice: which of the two is meant cannot be told."""
    owner: dict[str, Path] = {}
    for db in databases:
        for name in db.names:
            if name in owner:
                raise ValueError(
                    f"image {name} is in {owner[name]} and in {db.folder}{' again' if owner[name] == db.folder else ''}: give one"
                )
            owner[name] = db.folder


class ImageDatabase:
    """Folder `feat_th{conf}_max{max}_min{min}`, `feat_numbb{n}` or `all`; its region counts lie beside it as `nbb_*.json`."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when there is no database."""
        self.folder = folder
        with _environment(folder).begin() as reading:
            keys = reading.get(b"__keys__")
            self.names: list[str] = json.loads(keys) if keys else [k.decode() for k in reading.cursor().iternext(values=False)]
        self._known = set(self.names)
        counts = folder.name.removeprefix("feat_").removesuffix("_compressed")
        beside = folder.parent / ("nbb.json" if counts == "all" else f"nbb_{counts}.json")
        self.counts: dict[str, int] = read_json(beside) if beside.exists() else {}

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """features (R,Dv), norm_bb (R,6), conf, ..., float16, cut to the region count of this image. Raises ValueError when unreadable."""
        with _environment(self.folder).begin() as reading:
            value = reading.get(name.encode())
        if value is None:
            raise ValueError(f"{name} is not in {self.folder}")
        arrays = _unpack_npz(value) if value[:2] == b"PK" else _unpack_arrays(value)
        if not {"features", "norm_bb"} <= set(arrays):
            raise ValueError(f"{name} of {self.folder} holds {', '.join(arrays) or 'nothing'}, not features and norm_bb")
        count = self.counts.get(name, len(arrays["features"]))
        if name not in self.counts and self.folder.name == "all" and "conf" in arrays:
            count = region_count(arrays["conf"])
        return {key: array[:count] if array.ndim else array for key, array in arrays.items()}

    def tensors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """features (R,Dv) and boxes (R,7) float32: the stored x1 y1 x2 y2 w h, and w*h computed in float32."""
        arrays = self.arrays(name)
        boxes = arrays["norm_bb"].astype(np.float32)
        return arrays["features"].astype(np.float32), np.concatenate([boxes, boxes[:, 4:5] * boxes[:, 5:6]], 1)

    def digest(self) -> str:
        size = (self.folder / "data.mdb").stat().st_size
        return hashlib.sha256(json.dumps([self.names, self.counts, size]).encode()).hexdigest()


class TextDatabase:
    """Folder `*.db`: data.mdb, id2len.json, txt2img.json, img2txts.json, meta.json (ids of CLS and SEP)."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when the database or one of its index files is missing."""
        self.folder = folder
        _environment(folder)
        self.lengths: dict[str, int] = read_json(folder / "id2len.json")
        self.image_of: dict[str, str] = read_json(folder / "txt2img.json")
        self.captions_of: dict[str, list[str]] = read_json(folder / "img2txts.json")
        self.meta: dict[str, int] = read_json(folder / "meta.json")
        owner: dict[str, str] = {}
        for image, texts in self.captions_of.items():
            for text in texts:
                if owner.setdefault(text, image) != image or self.image_of.get(text, image) != image:
                    other = owner[text] if owner[text] != image else self.image_of[text]
                    raise ValueError(f"text {text} of {folder} is of {image} and of {other}: img2txts.json and txt2img.json must agree")

    def has_text(self) -> bool:
        """Whether its annotations keep the caption itself, as the first one tells; an empty database does."""
        first = next(iter(self.image_of), None)
        return first is None or bool(_own_text(self.annotation(first)))

    def annotation(self, text_id: str) -> Annotation:
        """`input_ids`, `img_fname` and whatever the annotation held. Raises ValueError when it is missing or unreadable."""
        with _environment(self.folder).begin() as reading:
            value = reading.get(text_id.encode())
        if value is None:
            raise ValueError(f"text {text_id} is not in {self.folder}")
        try:
            return msgpack.unpackb(pa.CompressedInputStream(pa.BufferReader(value), "lz4").read(), strict_map_key=False)
        except (OSError, ValueError, msgpack.UnpackException) as error:
            raise ValueError(f"text {text_id} of {self.folder} is unreadable: {error}") from None

    def input_ids(self, text_id: str) -> np.ndarray:
        """(n+2,) int64: CLS, the word pieces, SEP."""
        return np.array([self.meta["CLS"], *self.annotation(text_id)["input_ids"], self.meta["SEP"]], np.int64)

    def digest(self) -> str:
        size = (self.folder / "data.mdb").stat().st_size
        return hashlib.sha256(json.dumps([self.captions_of, self.lengths, size]).encode()).hexdigest()


def _pieces(vocab: str) -> list[str]:
    try:
        return files.read_bytes(vocab).decode().splitlines()
    except FileNotFoundError:
        raise ValueError(f"vocab={vocab} is not there, and a text database keeps word pieces only: put bert-base-cased's there") from None


def _several(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


def region_count(confidences: np.ndarray, threshold: float = 0.2, fewest: int = 10, most: int = 100) -> int:
    """Regions kept of one image: min(most, max(fewest, boxes with a confidence strictly above the threshold))."""
    return min(most, max(fewest, int((confidences > threshold).sum())))


@functools.cache
def _open(path: str) -> lmdb.Environment:
    return lmdb.open(path, readonly=True, lock=False, create=False, readahead=False, max_readers=256)


def _environment(folder: Path) -> lmdb.Environment:
    """One environment per folder and process: LMDB refuses to open the same database twice."""
    try:
        return _open(str(folder.resolve()))
    except lmdb.Error as error:
        raise ValueError(f"{folder} is no LMDB database (a folder with data.mdb): {error}") from None


def _unpack_npz(value: bytes) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(value), allow_pickle=False) as npz:
            return dict(npz.items())
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"unreadable npz: {error}") from None


def _unpack_arrays(value: bytes) -> dict[str, np.ndarray]:
    """msgpack-numpy writes an array as {nd, type, shape, data}, all keys bytes."""
    try:
        packed = msgpack.unpackb(value, raw=True, strict_map_key=False)
        return {key.decode(): _array(entry) for key, entry in packed.items()}
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise ValueError(f"unreadable msgpack: {error}") from None


def _array(entry: object) -> np.ndarray:
    if not isinstance(entry, dict):
        return np.asarray(entry)
    dtype = np.dtype(entry[b"type"].decode())
    return np.frombuffer(entry[b"data"], dtype).reshape(entry.get(b"shape", ()))


def _flat(conf: np.ndarray | None) -> np.ndarray | None:
    return None if conf is None else conf.reshape(-1).astype(np.float32)


def _own_text(annotation: Annotation) -> str:
    return next((str(annotation[field]) for field in TEXT_FIELDS if annotation.get(field)), "")
