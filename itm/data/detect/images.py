"""Image files below a folder, and the folder from which the paths of an annotation file lead to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from itm.data.detect.finding import Answers, choose, role_of

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
OTHERS = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".md", ".tar", ".zip", ".npy", ".parquet", ".arrow", ".yaml", ".html", ".py"}
_HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
TRIED = 50  # paths of an annotation file that are looked up below a folder
MOST_FILES = 200_000
DEPTH = 3


def walk(folder: Path, depth: int = 8) -> Iterator[Path]:
    """Files below a folder, sorted, without hidden ones and a Mac's twins; at most MOST_FILES."""
    yield from islice(_walk(folder, depth), MOST_FILES)


def _walk(folder: Path, depth: int, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """above: the real paths of the folders above: a link to one of them is not followed."""
    above = (*above, os.path.realpath(folder))
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_file():
            yield Path(entry.path)
        elif entry.is_dir() and depth and os.path.realpath(entry.path) not in above:
            yield from _walk(Path(entry.path), depth - 1, above)


def is_image(path: Path) -> bool:
    """By its suffix; a file without one that says something else, by its first bytes."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or suffix in OTHERS:
        return suffix in SUFFIXES
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith(_HEADS) or head[:4] + head[8:] == b"RIFFWEBP"


def looks_like_image(name: str) -> bool:
    """Whether a text is the name of an image file."""
    return Path(name.strip()).suffix.lower() in SUFFIXES


def image_root(names: Sequence[str], start: Path, answers: Answers, what: str) -> str:
    """The folder from which `names` lead to files: `start` or one below it, or that of `--image-root`.

    Raises Question where two folders hold as many of them, ValueError where none holds one.
    """
    tried = list(names[:: max(1, len(names) // TRIED)])[:TRIED]
    if given := answers.get("image-root"):
        if not _hits(Path(given), tried):
            raise ValueError(f"--image-root {given}: none of the images of {what} is there, e.g. {tried[0]}")
        return given
    hits = {folder: count for folder in _folders(start, DEPTH) if (count := _hits(folder, tried))}
    most = max(hits.values(), default=0)
    best = {str(folder): f"{count} of the {len(tried)} images looked up are there" for folder, count in hits.items() if count == most}
    role = role_of(what)
    if role and len(of_role := [folder for folder in best if role_of(Path(folder).name) == role]) == 1:
        best = {of_role[0]: best[of_role[0]]}  # train2017 belongs to captions_train2017.json
    if not best:
        raise ValueError(
            f"{what} names {tried[0] if tried else 'no image'}, and no such file lies in {start} or below: say --image-root FOLDER"
        )
    return choose(f"the images of {what} lie in more than one folder", "image-root", best, answers)


def _hits(folder: Path, names: Sequence[str]) -> int:
    return sum((folder / name).is_file() for name in names)


def _folders(start: Path, depth: int, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """As `_walk`, its folders."""
    above = (*above, os.path.realpath(start))
    yield start
    if depth:
        for entry in sorted(os.scandir(start), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith((".", "__MACOSX")) and os.path.realpath(entry.path) not in above:
                yield from _folders(Path(entry.path), depth - 1, above)
