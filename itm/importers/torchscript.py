"""State dicts of TorchScript archives (OpenAI's `ViT-B-32.pt`), read as data: the code inside is never compiled or run.

An archive is a zip: `data.pkl` pickles the tree of modules, `data/<key>` holds the bytes of its tensors. Here every class of the archive
(`__torch__.*`) becomes the same inert node, tensors are views of bytes of the file, and any other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
BROKEN = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, OSError)


class Node:
    """A module of the archive: its attributes by name, no behaviour."""

    state: dict[str, Any]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


class Named:
    """A function that the pickle may call, wrapped so that it can do nothing else to it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip with the records of a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """{dotted name: tensor} of every tensor in the tree of modules, on the CPU, plain tensor attributes among them.

    Raises ValueError for an archive that is broken or names anything beyond modules, tensors and lists.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            tree = _Reader(archive, root).load()
            return dict(_tensors(tree, ""))
    except (*BROKEN, StopIteration) as error:
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else f"it is no whole TorchScript archive ({type(error).__name__})"
        raise ValueError(
            f"{path} is refused: {reason}. Of a TorchScript archive only modules and tensors are read; save its state dict in a trusted "
            "place with torch.save(torch.jit.load(file).state_dict(), ...)"
        ) from None


class _Reader(pickle.Unpickler):
    """Knows modules, tensors, lists and ordered dicts; every other name is refused."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}
        super().__init__(io.BytesIO(self._record("data.pkl")))

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return Node
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return Named(_tensor)
        if (module, name) == ("collections", "OrderedDict"):
            return Named(OrderedDict)
        if module == "torch.jit._pickle" and name in LISTS:
            return Named(list)
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return Named(lambda value, _: value)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """The flat tensor of a storage: ("storage", dtype, key, device, elements)."""
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            data = self._record(f"data/{key}")
            self.storages[key] = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]

    def _record(self, name: str) -> bytes:
        info = self.archive.getinfo(self.root + name)
        if info.compress_type != zipfile.ZIP_STORED:  # PyTorch never compresses; a bomb does
            raise pickle.UnpicklingError(f"its record {name} is compressed")
        return self.archive.read(info)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage. Strides of 0 could make a small file a huge tensor."""
    if math.prod(size) > len(storage):
        raise pickle.UnpicklingError(f"it holds a tensor of {size} on {len(storage)} numbers")
    return storage.as_strided(size, stride, offset)


def _tensors(node: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in node.state.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Node):
            yield from _tensors(value, f"{prefix}{name}.")
