"""A matcher in a form of others. A form is one function and one line of FORMS."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from itm.exporters.huggingface import write_huggingface
from itm.exporters.onnx import write_onnx
from itm.types import Matcher

FORMS: dict[str, Callable[[Matcher, Path], None]] = {"huggingface": write_huggingface, "onnx": write_onnx}


def export_matcher(form: str, matcher: Matcher, folder: str | Path) -> Path:
    """Write `matcher` in `form` to `folder`, which appears whole or not at all; returns it.

    Raises ValueError for a folder that is there already, an unknown form, and what a form cannot hold.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    target = Path(folder)
    if target.exists():
        raise ValueError(f"{target} is there already: remove it, or choose another --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        FORMS[form](matcher, made)
        made.rename(target)
    return target
