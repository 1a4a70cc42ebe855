"""A matcher from whatever a name leads to: a matcher folder, the registry, or a Hugging Face model of two towers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import itm
from itm.config import Part
from itm.data import files
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import HFTokenizer
from itm.matchers.encoders.two_towers import Sizes, sizes_of
from itm.matchers.folder import build_matcher
from itm.types import Matcher

__all__ = ["Sizes", "load_any", "load_hub", "sizes_of"]


def load_any(name: str, allow: Iterable[str] = ()) -> Matcher:
    """`models:/...`, `runs:/...` and matcher folders as `itm.load_matcher`; else a Hugging Face model, by folder or hub name.

    Raises ValueError naming what is missing.
    """
    local = not files.is_remote(name) and not name.startswith(("models:/", "runs:/"))
    if local and not files.exists(files.join(name, "inputs.json")):
        return load_hub(name)
    return itm.load_matcher(name, allow=allow)


def load_hub(path: str) -> Matcher:
    """A model as it was trained, prepared as its own processor does: zero-shot. Raises ValueError for one without two towers."""
    sizes = sizes_of(path)
    crop: Literal["center", "squash"] = "center" if sizes.crop == "center" else "squash"
    inputs = Inputs(ImageInput(size=sizes.image, crop=crop), HFTokenizer(path, max_length=sizes.text, clean=False))
    return build_matcher(Part(kind="hf_dual", options={"path": path}), inputs).eval()
