"""What an index shows about its data: images that are nearly the same, never found or too often, captions of other images.

By the cosines of the matcher's vectors, over all pairs; counts are exact. I = images   T = captions
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.evaluation.uni_modal import uni_vectors
from itm.retrieval.index import Index
from itm.retrieval.scan import top

AT = 10
_SCORES = 1 << 23  # held at once
_PAIRS = 2_000_000


@dataclass(frozen=True)
class Group:
    """Images that are nearly the same, by their rows, and their splits. alike: the least cosine of a pair that joined two of them."""

    rows: list[int]
    splits: list[str]
    alike: float


@dataclass(frozen=True)
class Duplicates:
    """alike: the cosine from which two images count as the same. groups: those over several splits first, then by size."""

    alike: float
    images: int
    groups: list[Group]

    @property
    def across(self) -> list[Group]:
        """The groups over several splits: what is learnt from in one is asked for in the other."""
        return [group for group in self.groups if len(set(group.splits)) > 1]


@dataclass(frozen=True)
class Reach:
    """How many captions have an image among their first ten. times (I,) by place in `rows`, the rows of the images that can be found."""

    rows: Tensor
    times: Tensor
    captions: int

    @property
    def never(self) -> list[int]:
        return self.rows[self.times == 0].tolist()

    @property
    def hubs(self) -> list[tuple[int, int]]:
        """(row, times) of images found ten times as often as the mean and more, the most frequent first."""
        mean = AT * self.captions / max(1, len(self.rows))
        places = (self.times >= AT * mean).nonzero()[:, 0]
        order = places[self.times[places].argsort(descending=True, stable=True)]
        return list(zip(self.rows[order].tolist(), self.times[order].tolist(), strict=True))

    @property
    def skewness(self) -> float:
        """Of the times, the usual measure of hubness: 0 where all images are found equally often."""
        off = self.times.double() - self.times.double().mean()
        spread = float(off.square().mean()) ** 0.5
        return float((off**3).mean()) / spread**3 if spread else 0.0


@dataclass(frozen=True)
class Misfit:
    """A caption that fits another image better than its own: `before` images are nearer to it, the nearest is `other`."""

    caption: int
    own: int
    other: int
    own_score: float
    other_score: float
    before: int


@dataclass(frozen=True)
class Fit:
    """misfits: all of them, those with the widest gap first."""

    captions: int
    misfits: list[Misfit]


def duplicates(index: Index, alike: float) -> Duplicates:
    """Groups of images, copies included, in which each is joined to another by a cosine of at least `alike`.

    Raises ValueError for a bound that is no cosine, so many pairs that the bound says nothing, and a matcher without vectors.
    """
    if not 0 < alike <= 1:
        raise ValueError(f"--alike {alike:g} is no cosine of images that are nearly the same: say one between 0 and 1, e.g. .97")
    there = torch.arange(len(index.images)) if index.removed is None else (~index.removed).nonzero()[:, 0]
    vectors = F.normalize(uni_vectors(index.images.read(there, ("vector", "uni")), "image"), dim=1)
    parents = list(range(len(vectors)))
    least: dict[int, float] = {}
    pairs = 0
    for start, scores in _products(vectors, vectors):
        found = (scores >= min(alike, 1 - 1e-6)).nonzero()
        found = found[found[:, 0] + start < found[:, 1]]
        pairs += len(found)
        if pairs > _PAIRS:
            raise ValueError(f"more than {_PAIRS:,} pairs of images are alike by {alike:g}: say a larger --alike")
        for (one, other), score in zip(found.tolist(), scores[found[:, 0], found[:, 1]].tolist(), strict=True):
            low, high = sorted((_root(parents, one + start), _root(parents, other)))
            parents[high] = low
            least[low] = min(score, least.get(low, 1.0), least.pop(high, 1.0) if high != low else 1.0)
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(there.tolist()):
        groups.setdefault(_root(parents, place), []).append(row)
    splits = index.columns["split"]
    told = [Group(rows, [splits[row].as_py() for row in rows], least[root]) for root, rows in groups.items() if len(rows) > 1]
    return Duplicates(alike, len(vectors), sorted(told, key=lambda g: (-len(set(g.splits)), -len(g.rows), g.rows)))


def _root(parents: list[int], row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row


def reach_and_fit(index: Index) -> tuple[Reach, Fit]:
    """Every caption asked for all images. Raises ValueError for an index without captions, and a matcher without vectors."""
    if not len(index.captions):
        raise ValueError(f"the images of {index.place} have no captions to ask with, so nobody knows which of them are found")
    images, captions = _rows(index, "images"), _rows(index, "captions")
    gallery, asked = _unit(index.images.read(images).vector), _unit(index.captions.read(captions).vector)
    place = torch.full((len(index.images),), -1).scatter(0, images, torch.arange(len(images)))
    own = place[index.names.caption_image[captions]]
    times = torch.zeros(len(images), dtype=torch.int64)
    misfits = []
    for start, scores in _products(asked, gallery):
        values, best = top(scores, min(AT, len(images)))
        times += torch.bincount(best.flatten(), minlength=len(images))
        truth = own[start : start + len(scores)]
        reached = scores.gather(1, truth[:, None])
        before = (scores > reached).sum(1)
        for n in before.nonzero()[:, 0].tolist():
            numbers = int(captions[start + n]), int(images[truth[n]]), int(images[best[n, 0]])
            misfits.append(Misfit(*numbers, float(reached[n, 0]), float(values[n, 0]), int(before[n])))
    misfits.sort(key=lambda m: (m.own_score - m.other_score, m.caption))
    return Reach(images, times, len(captions)), Fit(len(captions), misfits)


def _rows(index: Index, find: str) -> Tensor:
    rows = index.rows("images" if find == "images" else "captions")
    return torch.arange(len(index.images if find == "images" else index.captions)) if rows is None else rows


def _unit(vectors: Tensor | None) -> Tensor:
    if vectors is None:
        raise ValueError("this matcher gives no vectors, by which an index could be looked through: index with a dual encoder")
    return F.normalize(vectors, dim=1)


def _products(left: Tensor, right: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, scores of some rows with all of the other side)."""
    step = max(1, _SCORES // max(1, len(right)))
    for start in range(0, len(left), step):
        yield start, left[start : start + step] @ right.T
