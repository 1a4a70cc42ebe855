"""Teacher vectors that CUSA's authors stored: `.npy` files of one pickled dict, {image_id: (1, D)} or {caption: (D,)}.

Layout: docs/methods/cusa.md#stored-teacher-vectors.
The pickle is read as data: numpy arrays, strings, numbers and containers; every other name in it is refused.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from itm.data import files
from itm.data.records import Caption
from itm.data.shards import Sample
from itm.data.text import clean_caption
from itm.teachers.identity import Modality, Teacher

ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")


class CusaNpyTeacher(Teacher):
    """Rows of `path`, one file or several (a split each), looked up by the image_id of a sample, or by a caption as it is or cleaned up.

    An image whose name is a number, as precomputed regions have it, is also found as the one row whose name ends in that number (391895
    and COCO_val2014_000000391895.jpg).

    Every process holds the vectors in memory as the file has them (15.9 GB for COCO train at width 37,632), while it fills the store.
    """

    def __init__(self, path: str | list[str], modality: Modality) -> None:
        """Raises ValueError for a file that is missing, holds other objects, or vectors that are not (D,) or (1, D) of one width D > 1."""
        self.modality = modality
        paths = [Path(files.absolute(p)) for p in ([path] if isinstance(path, str) else path)]
        self.vectors: dict[str, np.ndarray] = {}
        for file in paths:
            self.vectors |= {str(key): _vector(file, key, value) for key, value in read_dict(file).items()}
        widths = sorted({len(vector) for vector in self.vectors.values()})
        if len(widths) != 1:
            raise ValueError(f"{', '.join(map(str, paths))}: vectors of widths {widths or 'none'}; all must have the same")
        self.width = widths[0]
        known = frozenset(self.vectors)
        images = partial(_image_key, known=known, numbers=_numbers(known))
        self.prepare = images if modality == "image" else partial(_caption_key, known=known)
        self.identity = {
            "kind": "cusa_npy",
            "model": "+".join(file.name for file in paths),
            "revision": None,
            "weights_sha256": "+".join(map(_file_sha256, paths)),
            "layer": "stored",
            "width": self.width,
            "dtype": "as stored",
            "preprocessing": {"key": modality},
        }

    def embed(self, payloads: Sequence[bytes]) -> np.ndarray:
        """payloads: UTF-8 keys -> (N, D) float32."""
        return np.stack([self.vectors[payload.decode()] for payload in payloads]).astype(np.float32)


def _numbers(names: frozenset[str]) -> dict[str, str]:
    """Number at the end of a name, without leading zeros -> the name; those that several names end in are left out."""
    found: dict[str, list[str]] = {}
    for name in names:
        if number := _number(name):
            found.setdefault(number, []).append(name)
    return {number: held[0] for number, held in found.items() if len(held) == 1}


def _number(name: str) -> str:
    ending = re.search(r"(\d+)(\.\w+)?$", name)
    return (ending[1].lstrip("0") or "0") if ending else ""


def _image_key(sample: Sample, known: frozenset[str], numbers: dict[str, str]) -> bytes:
    given = [str(sample.meta[name]) for name in ("image_id", "filename") if name in sample.meta] + [sample.key]
    by_number = [numbers[number] for name in given if name.isdigit() and (number := _number(name)) in numbers]
    return _found(given if known.intersection(given) else given + by_number, known, f"sample {sample.key!r}")


def _caption_key(caption: Caption, known: frozenset[str]) -> bytes:
    return _found([caption.text] if caption.text in known else [clean_caption(caption.text)], known, f"caption {caption.id!r}")


def _found(names: list[str], known: frozenset[str], what: str) -> bytes:
    for name in names:
        if name in known:
            return name.encode()
    raise ValueError(f"{what}: the stored vectors have no key {' or '.join(map(repr, names))}; give the file of this split")


def _vector(file: Path, key: object, value: object) -> np.ndarray:
    array = value if isinstance(value, np.ndarray) else np.empty(0)
    if array.ndim not in (1, 2) or array.size != array.shape[-1] or array.size < 2 or array.dtype.kind != "f":
        raise ValueError(
            f"{file}: the value of {key!r} is {getattr(value, 'shape', type(value).__name__)}, want floats (1, D) or (D,), D > 1"
        )
    return array.reshape(-1)


def _file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_dict(file: Path) -> dict[object, object]:
    """The one dict in an .npy of object type. Raises ValueError naming the file and what it holds instead."""
    try:
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(stream)
            if shape != () or not dtype.hasobject:
                raise ValueError(f"an array {shape} of {dtype}, not one pickled dict")
            held = _Reader(stream).load()
        content = held.objects[0] if isinstance(held, _Array) else held
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not a dict")
        return {key: value.array() if isinstance(value, _Array) else value for key, value in content.items()}
    except FileNotFoundError:
        raise ValueError(f"no teacher vectors at {file}") from None
    except (ValueError, pickle.UnpicklingError, EOFError, TypeError, AttributeError, IndexError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is no .npy of teacher vectors: {error}") from None


class _Type:
    """A pickled dtype: the name is kept, whatever else it says is checked when the array is made."""

    def __init__(self, name: str, *_: object) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """A pickled array before its bytes are looked at."""

    objects: list[object]

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state
        self.objects = state[4] if isinstance(state[4], list) else []

    def array(self) -> np.ndarray:
        _, shape, kind, fortran, data = self.state
        return _array(data, kind, shape, "F" if fortran else "C")


class _Call:
    """A function of the allow-list; a pickle can call it and do nothing else to it."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    def __call__(self, *args: object) -> object:
        return self.function(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function has no state")


def _array(data: bytes, kind: _Type, shape: tuple[int, ...], order: Literal["F", "C"]) -> np.ndarray:
    if not isinstance(kind, _Type) or kind.name not in ("f2", "f4", "f8"):
        raise ValueError(f"an array of {getattr(kind, 'name', kind)!r}, not of floats")
    return np.frombuffer(data, ("<" if kind.order not in ("<", ">") else kind.order) + kind.name).reshape(shape, order=order)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module in ARRAY_MODULES and name == "_reconstruct":
            return _Call(_Array)
        if module in ARRAY_MODULES and name == "_frombuffer":
            return _Call(_array)
        if (module, name) == ("numpy", "ndarray"):
            return None
        if (module, name) == ("numpy", "dtype"):
            return _Call(_Type)
        if (module, name) == ("_codecs", "encode"):
            return _Call(lambda text, _: text.encode("latin1"))
        if (module, name) == ("collections", "OrderedDict"):
            return _Call(dict)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is refused")
