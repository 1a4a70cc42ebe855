"""The names of a shard's members: where the key of a sample ends and the kind of the file begins."""

from __future__ import annotations

from collections.abc import Iterable

from itm.data.records import IMAGE_FORMATS

REGIONS = "regions.npz"
CONTENT = {*IMAGE_FORMATS, REGIONS, "json", "txt"}


def cut_first(name: str) -> tuple[str, str]:
    """Key and extension as WebDataset cuts them, at the first dot; '' for a hidden file."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem if stem else "", extension.lower()


def dotted_keys(names: Iterable[str]) -> set[str]:
    """Keys with dots that have both an image (or regions) and captions: samples of their own, even where their first part is a key, too
    (`22.jpg` and `22.05.jpg`). A lone `22.mask.png` is a further member of `22`."""
    held: dict[str, set[bool]] = {}
    for key, extension in map(cut_last, names):
        if extension in CONTENT and "." in key.rpartition("/")[2]:
            held.setdefault(key, set()).add(extension in ("json", "txt"))
    return {key for key, kinds in held.items() if key and len(kinds) == 2}


def cut_last(name: str) -> tuple[str, str]:
    """Key and extension where the key itself has dots (`trip_v1.5.jpg`)."""
    name = name.removeprefix("./")
    stem, _, extension = name.rpartition(".")
    if name.lower().endswith(f".{REGIONS}"):
        stem, extension = name[: -len(REGIONS) - 1], REGIONS
    return "" if stem.rpartition("/")[2].startswith(".") else stem, extension.lower()
