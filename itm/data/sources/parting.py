"""Other splits than a source has: shares, lists of images, or a column. The one place for it, whatever the source.

data.source: {kind: csv, options: {path: captions.csv, split: {val: 0.1, test: 0.1}}}
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from itm.data import files
from itm.data.formats import Json
from itm.data.records import Problem, Record
from itm.data.sources import SOURCES
from itm.data.sources.source import Source, read_json
from itm.data.sources.splits import SPLIT_NAMES, in_order
from itm.data.sources.tables import normal, text_lines
from itm.kinds import build_part, find_part, options_of
from itm.progress import Progress

OPTION = "split"
_TRAIN = {**SPLIT_NAMES, "restval": "train"}  # as every retrieval paper takes COCO's


def build_source(kind: str, options: Mapping[str, Any]) -> Source:
    """The source of a recipe, in the splits that its option `split` asks for. Raises ValueError as `build_part`."""
    part: Callable[..., Source] = find_part(SOURCES, kind, "source")
    own, takes_any = options_of(part)
    if OPTION not in options or OPTION in own or takes_any:
        return build_part(SOURCES, kind, options, "source")
    rest = {name: value for name, value in options.items() if name != OPTION}
    return Parted(build_part(SOURCES, kind, rest, "source"), options[OPTION])


@dataclass(frozen=True)
class _Parts:
    """items: split -> (split of the base, item there). left: what belongs to no split, and list entries without an image."""

    items: dict[str, list[tuple[str, int]]]
    left: list[Problem]


class Parted(Source):
    """`split`, one of
    - shares, `{val: 0.1, test: 0.1}`: of `train`, which keeps the rest, by the sha256 of an image's bytes (of its key where there is no
      image), so that equal bytes are in one split, and stay in it when others are added;
    - lists, `{train: a.txt, test: b.txt}`: a name, path, key or image_id a line; or the names themselves;
    - a Karpathy file, `dataset_coco.json`, whose `filename` or `cocoid` says which image is meant;
    - the name of a field that the source knows of each image, `split` or another.

    Raises ValueError for shares that leave nothing, a split that the source has already, and an image in two lists.
    """

    def __init__(self, base: Source, split: str | Mapping[str, Any]) -> None:
        self.base, self.split = base, split
        self.shares = _shares(split)
        self.lists = {} if self.shares else _lists(split)
        if taken := [name for name in self.shares if name in base.splits]:
            raise ValueError(f"data.source.options.split: this source has a split {taken[0]} already ({', '.join(base.splits)})")

    @property
    def _shared_out(self) -> str:
        """The split that shares are taken from."""
        return self.base.splits[0] if len(self.base.splits) == 1 else "train"

    @cached_property
    def splits(self) -> list[str]:  # type: ignore[override]
        if self.shares:
            others = [name for name in self.base.splits if name != self._shared_out]
            return list(in_order(dict.fromkeys(["train", *others, *self.shares])))
        return list(self._parts.items)

    @cached_property
    def _parts(self) -> _Parts:
        """Made by the driver alone: one pass over the images, or over what is known of them."""
        if self.shares:
            return _by_shares(self.base, self.splits, self._shared_out, self.shares)
        return _by_names(self.base, self.split, self.lists)

    def count(self, split: str) -> int:
        return len(self._parts.items.get(split, []))

    def identity(self) -> Json:
        lists = hashlib.sha256(repr(sorted(self.lists.items())).encode()).hexdigest() if self.lists else None
        return {"source": "Parted", "of": self.base.identity(), "split": self.shares or self.split, "lists": lists}

    def uncaptioned(self, split: str) -> bool:
        return all(self.base.uncaptioned(name) for name in self.base.splits)

    def passed_over(self, split: str) -> list[Problem]:
        """What the source passes over, images that no list or column gives to a split, and entries of lists without an image."""
        if split != self.splits[0]:
            return []
        return [problem for name in self.base.splits for problem in self.base.passed_over(name)] + self._parts.left

    def places(self, split: str, start: int, stop: int) -> list[Any]:
        items = self._parts.items[split][start:stop]
        return [[name, self.base.places(name, item, item + 1)[0]] for name, item in items]

    def item(self, split: str, index: int) -> Record | Problem:
        return next(self.at(split, self.places(split, index, index + 1)))

    def at(self, split: str, places: list[Any]) -> Iterator[Record | Problem]:
        for name, group in groupby(places, key=lambda place: str(place[0])):
            for item in self.base.at(name, [place for _, place in group]):
                yield replace(item, split=split) if isinstance(item, Record) else item

    def abouts(self, split: str) -> Iterator[Json]:
        known = {name: list(self.base.abouts(name)) for name in self.base.splits}
        yield from (known[name][item] for name, item in self._parts.items[split])


def _by_shares(base: Source, splits: list[str], shared_out: str, shares: Mapping[str, float]) -> _Parts:
    items: dict[str, list[tuple[str, int]]] = {name: [] for name in splits}
    for name in base.splits:
        if name != shared_out:
            items[name] = [(name, item) for item in range(base.count(name))]
    total = base.count(shared_out)
    with Progress("split", total, "image") as progress:
        for item, record in enumerate(base.records(shared_out)):
            items[share_of(record, shares)].append((shared_out, item))
            progress.update(1)
    if empty := [name for name in shares if not items[name]]:
        raise ValueError(f"split {empty[0]} gets none of {total} images for its share of {shares[empty[0]]:g}: give it a larger one")
    return _Parts(items, [])


def _by_names(base: Source, split: str | Mapping[str, Any], lists: Mapping[str, str]) -> _Parts:
    items: dict[str, list[tuple[str, int]]] = {}
    left: list[Problem] = []
    used: set[str] = set()
    missing = f"in no list of data.source.options.split ({', '.join(sorted({*lists.values()}))})"
    for name in base.splits:
        for item, about in enumerate(base.abouts(name)):
            chosen, names = _chosen(about, split, lists)
            used |= names
            if chosen is None:
                reason = missing if lists else f"has no {split}, which names its split"
                left.append(Problem(about["key"], "", "source", reason, "member"))
            else:
                items.setdefault(chosen, []).append((name, item))
    if not items:
        known = next((about for name in base.splits for about in base.abouts(name)), {})
        there = ", ".join(f"{name}={value!r}" for name, value in known.items())
        raise ValueError(f"data.source.options.split={split!r} gives no image of this source to a split; of an image is known: {there}")
    unused = [(name, chosen) for name, chosen in lists.items() if name not in used]
    left += [Problem(n, "", "source", f"listed for {chosen}, but no image has this name", "member") for n, chosen in unused]
    return _Parts(in_order(items), left)


def _chosen(about: Json, split: str | Mapping[str, Any], lists: Mapping[str, str]) -> tuple[str | None, set[str]]:
    """The split of an image, and the entries of lists that name it."""
    if not lists:
        said = about.get(str(split))
        return (None if said is None or said == "" else _TRAIN.get(str(said).lower(), str(said))), set()
    name = normal(str(about.get("filename") or about["key"]))
    base = name.rpartition("/")[2]
    names = {name, base, base.rpartition(".")[0] or base, str(about["key"]), str(about.get("image_id", about["key"]))} & lists.keys()
    splits = {lists[n] for n in names}
    if len(splits) > 1:
        raise ValueError(f"data.source.options.split: the image {name} is in the lists of {' and '.join(sorted(splits))}")
    return (splits.pop() if splits else None), names


def share_of(record: Record | Problem, shares: Mapping[str, float]) -> str:
    """The split of an item: a number in [0, 1) made of its bytes falls into the share of one split, or of `train` behind them all."""
    said = record.image if isinstance(record, Record) and record.image is not None else record.key.encode(errors="surrogatepass")
    number, end = int.from_bytes(hashlib.sha256(said).digest()[:8], "big") / 2**64, 0.0
    for name, share in shares.items():
        end += share
        if number < end:
            return name
    return "train"


def _shares(split: str | Mapping[str, Any]) -> dict[str, float]:
    if not isinstance(split, Mapping) or not any(isinstance(value, int | float) for value in split.values()):
        return {}
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < 1 for v in split.values()):
        raise ValueError(f"data.source.options.split: shares are numbers between 0 and 1, as in {{val: 0.1, test: 0.1}}, not {dict(split)}")
    total, shares = sum(split.values()), {str(name): float(value) for name, value in split.items() if name != "train"}
    if total > 1 + 1e-9 or ("train" in split and total < 1 - 1e-9) or ("train" not in split and total > 1 - 1e-9):
        raise ValueError(
            f"data.source.options.split: the shares of {', '.join(split)} are {total:g} together, and train has what is left of 1"
        )
    return shares


def _lists(split: str | Mapping[str, Any]) -> dict[str, str]:
    """Name of an image -> its split, of lists or a Karpathy file; empty for a field."""
    found: dict[str, str] = {}
    for chosen, names in _named(split):
        for name in names:
            if found.setdefault(name, chosen) != chosen:
                raise ValueError(f"data.source.options.split: {name} is in the lists of {found[name]} and of {chosen}")
    return found


def _named(split: str | Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    if isinstance(split, str):
        if split.endswith(".json"):
            yield from _karpathy(split)
        return
    for chosen, said in split.items():
        if isinstance(said, str):
            uri = files.absolute(said)
            if not files.exists(uri):
                raise ValueError(f"data.source.options.split.{chosen}: no list at {uri}")
            said = text_lines(uri, files.read_bytes(uri))
        yield str(chosen), [normal(str(name).strip()) for name in said if str(name).strip()]


def _karpathy(path: str) -> Iterator[tuple[str, list[str]]]:
    said = read_json(files.absolute(path))
    if not isinstance(said, dict) or not isinstance(said.get("images"), list):
        raise ValueError(f"{path} is no Karpathy split file: it has no `images`")
    for number, image in enumerate(said["images"]):
        if not isinstance(image, dict) or not image.get("split") or not image.get("filename"):
            raise ValueError(f"{path} image {number} has no `split` or no `filename`")
        yield str(_TRAIN.get(image["split"], image["split"])), [normal(image["filename"])]
