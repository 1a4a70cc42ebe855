"""What people call their splits, and what we call them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
ORDER = ("train", "val", "test")


def split_of(path: str) -> str | None:
    """The split that a file belongs to by its name, else by the nearest folder that says one: `data/validation-00000-of-00002.parquet`."""
    for part in reversed(path.split("/")):
        said = {SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLIT_NAMES}
        if len(said) == 1:
            return said.pop()
    return None


def in_order(splits: Mapping[str, T]) -> dict[str, T]:
    """train, val, test first, then the others as they came."""
    return {name: splits[name] for name in sorted(splits, key=lambda s: ORDER.index(s) if s in ORDER else len(ORDER))}
