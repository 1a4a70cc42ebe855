"""Reading the authors' checkpoints: what a file holds is found out from its keys, and nothing in it is ever executed.

    matcher = load_official("model_best.pth.tar")       # SCAN, SGR, SAF
    matcher = load_official("uniter-base.pt", heads=12) # UNITER, IAIS
    matcher = load_official("ViT-B-32.pt")              # OpenAI's CLIP, a TorchScript archive

Pickles are read with `weights_only` and a short allow-list; anything else in them is refused.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar

from itm.data import files
from itm.device import resolve_device
from itm.importers.scan import load_scan
from itm.importers.state import state_of
from itm.importers.torchscript import is_torchscript, read_torchscript
from itm.types import Matcher

PLAIN_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    scalar,
    (scalar, "numpy.core.multiarray.scalar"),
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
]
"""Beside tensors and containers: option objects and numpy numbers, which the authors' scripts store as they are."""


def load_official(path: str | Path, *, device: str = "cpu", **needed: Any) -> Matcher:
    """The matcher of an authors' checkpoint, in evaluation mode. SCAN, SGR, SAF, UNITER and IAIS, CUSA, OpenAI and HF CLIP.

    device: auto, cpu, cuda, ... `needed` supplies what a file of the family does not say; of CLIP the config.json beside the file says it.
    Raises FileNotFoundError; ValueError for an option that the family does not know, and for a file that is no checkpoint, holds objects
    other than tensors and plain values, is of no known family, or does not fit its family (keys named).
    """
    target, checkpoint = resolve_device(device), read_checkpoint(path)
    family = recognise(checkpoint)
    try:
        if family == "scan":
            return load_scan(checkpoint, **needed).to(target)
        if family == "uniter":
            from itm.importers.uniter import load_uniter

            return load_uniter(state_of(checkpoint), **needed).to(target)
        if family == "clip":
            from itm.importers.clip import load_clip, settings_beside

            return load_clip(state_of(checkpoint), settings_beside(path), **needed).to(target)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if any(key.endswith("blocks.0.attn.qkv.weight") for key in _keys(checkpoint)):
        raise ValueError(
            f"{path} is a vision transformer alone, such as Unicom's: no matcher, but a teacher of images. Set teachers.image to "
            "{kind: unicom, options: {path: ...}}"
        )
    found = ", ".join(sorted(_keys(checkpoint))[:6]) or "nothing"
    raise ValueError(f"{path} is of no known family (SCAN, SGRAF, UNITER, IAIS, CUSA, CLIP); it holds {found}")


def read_checkpoint(path: str | Path) -> Any:
    """The content of a checkpoint on the CPU, without running code.

    Formats: zip and legacy `torch.save` (Python 2 pickles too), safetensors, TorchScript.
    Raises FileNotFoundError, and ValueError for a file that is none of these or holds objects outside the allow-list.
    """
    path = Path(files.absolute(path))
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if is_torchscript(path):
        return read_torchscript(path)
    try:
        with torch.serialization.safe_globals(PLAIN_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "pickle_load_args only works ...": it does reach the strings of Python 2
            return torch.load(path, map_location="cpu", weights_only=True, encoding="latin1")
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        foreign = re.search(r"(?i)unsupported (?:global: )?global (\S+)", str(error))
        reason = f"it holds {foreign[1]}" if foreign else f"it is no whole checkpoint ({type(error).__name__})"
        raise ValueError(
            f"{path} is refused: {reason}. Only tensors, containers, options and numbers are read; a file that holds other objects "
            "could run code. Re-save its state dicts alone if you trust where it comes from."
        ) from None


def recognise(checkpoint: Any) -> str | None:
    """scan (SCAN, SGR, SAF), uniter (UNITER, IAIS), clip (OpenAI, HF, CUSA), or None, from the structure and the keys."""
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("model"), list):
        return "scan" if len(checkpoint["model"]) in (2, 3) and all(isinstance(p, Mapping) for p in checkpoint["model"]) else None
    keys = _keys(checkpoint)
    if any("img_embeddings." in key for key in keys):
        return "uniter"
    if any(key.endswith(("visual.proj", "visual_projection.weight")) or "visual.attnpool." in key for key in keys):
        return "clip"
    return None


def _keys(checkpoint: object) -> list[str]:
    return list(map(str, state_of(checkpoint))) if isinstance(checkpoint, Mapping) else []
