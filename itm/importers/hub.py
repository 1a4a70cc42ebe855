"""A matcher from a Hugging Face model of two towers, by folder or hub name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from itm.config import Part
from itm.data import files
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import HFTokenizer
from itm.matchers.encoders.two_towers import Sizes, sizes_of
from itm.matchers.folder import build_matcher
from itm.types import Matcher

__all__ = ["Sizes", "is_hub", "load_hub", "sizes_of"]


def is_hub(name: str) -> bool:
    """Whether a name that is no URI leads to a Hugging Face model: a folder with its config.json, or a hub name where nothing lies."""
    place = Path(files.absolute(name))
    if place.exists():
        config = place / "config.json"
        return config.is_file() and "model_type" in json.loads(config.read_bytes())
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def load_hub(path: str) -> Matcher:
    """A model as it was trained, prepared as its own processor does: zero-shot. Raises ValueError for one without two towers."""
    sizes = sizes_of(path)
    crop: Literal["center", "squash"] = "center" if sizes.crop == "center" else "squash"
    inputs = Inputs(ImageInput(size=sizes.image, crop=crop), HFTokenizer(path, max_length=sizes.text, clean=False))
    return build_matcher(Part(kind="hf_dual", options={"path": path}), inputs).eval()
