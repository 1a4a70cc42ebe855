"""Screened retrieval: cheap vectors propose k candidates for every image and every caption, the matcher scores these pairs alone.

Approximate, and it says by how much: on random queries, scored exactly against the whole gallery, the share that the screen loses (a hit
among the first K that is not proposed) with its 95 % Wilson interval. `choose_k` takes the smallest k that keeps a wanted bound.
Pairs that are not scored rank below all scored ones, by the cosine of their vectors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.evaluation.counting import BLOCK_SCORES
from itm.evaluation.metrics import KS, Positives, Ranking, Streamed, rank_queries
from itm.evaluation.scoring import score_matrix
from itm.types import Encoded, Matcher, Options

Z95 = 1.959963984540054
Vectors = tuple[Tensor, Tensor]
Sides = Sequence[tuple[Encoded, Encoded]]
Cheap = Callable[[int, Tensor], Tensor]
"""(0 = images ask for captions, 1 = captions for images; rows that ask (n,)) -> (n,G), the scores by which a screen proposes."""


def unit_vectors(images: Encoded, captions: Encoded) -> Vectors:
    """Unit vectors (I,D) and (T,D) to screen with. Raises ValueError for a matcher that has none, or of two widths."""
    if images.vector is None or captions.vector is None:
        raise ValueError("this matcher gives no vectors to screen with: name a dual encoder by --screen-matcher")
    if images.vector.shape[1] != captions.vector.shape[1]:
        raise ValueError(
            f"image vectors are {images.vector.shape[1]} wide, caption vectors {captions.vector.shape[1]}: no cosine to screen by"
        )
    return F.normalize(images.vector.float(), dim=1), F.normalize(captions.vector.float(), dim=1)


def by_cosine(vectors: Vectors) -> Cheap:
    """vectors: of unit length, of images and captions."""
    return lambda way, rows: vectors[way][rows] @ vectors[1 - way].T


class ScreenedScores(Streamed):
    """Pairs (P,) by row, then column, with their scores; all other pairs lie below the lowest score by their cosine."""

    dtype = "float64"

    def __init__(self, vectors: Vectors, pairs: tuple[Tensor, Tensor], values: Tensor) -> None:
        self.vectors, self.pairs, self.values = vectors, pairs, values
        self.report: Options = {}
        self.shape = len(vectors[0]), len(vectors[1])
        self._starts = torch.searchsorted(pairs[0].contiguous(), torch.arange(self.shape[0] + 1))

    @property
    def T(self) -> ScreenedScores:
        rows, columns = self.pairs
        order = (columns * self.shape[0] + rows).argsort()
        return ScreenedScores((self.vectors[1], self.vectors[0]), (columns[order], rows[order]), self.values[order])

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Dense rows (n,G), float64: every float32 score keeps its value, and the others their order."""
        chosen = torch.arange(self.shape[0])[rows]
        dense = (self.vectors[0][chosen] @ self.vectors[1].T).double() + (float(self.values.min()) - 2.0)
        counts = self._starts[chosen + 1] - self._starts[chosen]
        local = torch.arange(len(chosen)).repeat_interleave(counts)
        place = torch.arange(len(local)) - (counts.cumsum(0) - counts)[local] + self._starts[chosen][local]
        dense[local, self.pairs[1][place]] = self.values[place].double()
        return dense

    def rank(self, positives: Positives, tie: str, absent: Tensor | None = None) -> Ranking:
        pieces = []
        for rows in _blocks(*self.shape):
            truth = (positives[0][rows], positives[1]) if isinstance(positives, tuple) else positives[rows]
            pieces.append(rank_queries(self[rows], truth, tie, None if absent is None else absent[rows]))
        return Ranking.cat(pieces)


def screened_scores(members: Sequence[Matcher], sides: Sides, k: int, vectors: Vectors, options: Options | None = None) -> ScreenedScores:
    """Scores of the k best captions of every image and the k best images of every caption, by the vectors.

    sides: (images, captions) of each member; options: some of `score_matrix`. k of the gallery or more is exact.
    Raises ValueError for k < 1 and for NaN scores.
    """
    if k < 1:
        raise ValueError(f"a screen keeps at least 1 candidate, not {k}")
    rows, columns = propose(vectors, k)
    starts = torch.searchsorted(rows, torch.arange(len(vectors[0]) + 1)).tolist()
    values = []
    for image, (first, last) in enumerate(itertools.pairwise(starts)):
        own, chosen = slice(image, image + 1), columns[first:last]
        pieces = [images[own] for images, _ in sides], [captions[chosen] for _, captions in sides]
        values.append(score_matrix(list(members), *pieces, **(options or {}))[0])
    scores = torch.cat(values)
    if bool(scores.isnan().any()):
        bad = int(scores.isnan().nonzero()[0])
        raise ValueError(f"{int(scores.isnan().sum())} scores are NaN, the first at image {int(rows[bad])}, caption {int(columns[bad])}")
    return ScreenedScores(vectors, (rows, columns), scores)


def propose(vectors: Vectors, k: int) -> tuple[Tensor, Tensor]:
    """(image rows (P,), caption columns (P,)) in order: every pair that one side has among its k best by cosine."""
    images, captions = vectors
    codes = []
    for rows in _blocks(len(images), len(captions)):
        best = (images[rows] @ captions.T).topk(min(k, len(captions))).indices
        codes.append((torch.arange(len(images))[rows, None] * len(captions) + best).flatten())
    for rows in _blocks(len(captions), len(images)):
        best = (captions[rows] @ images.T).topk(min(k, len(images))).indices
        codes.append((best * len(captions) + torch.arange(len(captions))[rows, None]).flatten())
    code = torch.unique(torch.cat(codes))
    return code // len(captions), code % len(captions)


@dataclass(frozen=True)
class Probe:
    """What random queries of one way need. needed (n, len(KS)): the least k that keeps the exact hit among the first K; 0 = no exact hit.

    whole: the sample is all queries, so its shares have no sampling error.
    """

    way: str
    needed: Tensor
    whole: bool

    def loss(self, k: int) -> dict[int, tuple[float, float, float]]:
        """K -> (share of queries whose hit is lost, low, high), shares of all sampled queries."""
        found = {}
        for place, at in enumerate(KS):
            lost, n = int((self.needed[:, place] > k).sum()), len(self.needed)
            found[at] = (lost / n, *((lost / n, lost / n) if self.whole else wilson(lost, n)))
        return found

    def report(self, k: int) -> Options:
        """JSON-able, in percent: n, and for each K recall (exact), lost, low, high."""
        exact = (self.needed > 0).double().mean(0).tolist()
        rows = {f"r{at}": [100 * x for x in (exact[place], *self.loss(k)[at])] for place, at in enumerate(KS)}
        return {
            "queries": len(self.needed),
            **{at: dict(zip(("exact", "lost", "low", "high"), row, strict=True)) for at, row in rows.items()},
        }


def probe(
    members: Sequence[Matcher], sides: Sides, cheap: Cheap, sample: tuple[Tensor, int, int], options: Options | None = None
) -> list[Probe]:
    """Score random images and captions exactly against the whole gallery; one `Probe` each way.

    sample: (image row of each caption (T,), queries each way, seed). Ties count against the positive in the exact order and in the
    screen's, so the loss is never understated.
    """
    caption_image, queries, seed = sample
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(len(sides[0][0])), caption_image
    found = []
    for way in (0, 1):
        rows = torch.randperm(len(owners[way]), generator=generator)[:queries].sort().values
        pieces = [[side[which][rows] if which == way else side[which] for side in sides] for which in (0, 1)]
        exact = score_matrix(list(members), pieces[0], pieces[1], **(options or {}))
        proposing = cheap(way, rows)
        truth = owners[way][rows, None] == owners[1 - way][None]
        needed = torch.stack([_needed(*row) for row in zip(exact.T if way else exact, proposing, truth, strict=True)])
        found.append(Probe("t2i" if way else "i2t", needed, len(rows) == len(owners[way])))
    return found


def choose_k(probes: Sequence[Probe], bound: float) -> int:
    """The least k whose loss has an upper limit of at most `bound` (a share) at every K, both ways.

    Raises ValueError when so small a sample cannot show so small a loss, with the sample that could.
    """
    for p in probes:
        if not p.whole and wilson(0, len(p.needed))[1] > bound:
            wanted = math.ceil(Z95**2 * (1 - bound) / bound)
            raise ValueError(
                f"{len(p.needed)} sampled queries cannot show a loss of at most {bound:.2%}: sample {wanted}, or allow a larger loss"
            )
    steps = torch.unique(torch.cat([p.needed.flatten() for p in probes] + [torch.tensor([max(KS)])]))
    for k in steps[steps >= max(KS)].tolist():
        if all(high <= bound for p in probes for _, _, high in p.loss(k).values()):
            return int(k)
    lost = {p.way: int((p.needed > steps.max()).sum()) for p in probes}
    raise RuntimeError(f"the largest k that any query needs, {int(steps.max())}, still loses hits of {lost}")


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    share, z2 = hits / n, Z95**2
    centre, spread = share + z2 / (2 * n), Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z2 / n)), min(1.0, (centre + spread) / (1 + z2 / n))


def _needed(exact: Tensor, proposing: Tensor, truth: Tensor) -> Tensor:
    """(len(KS),): over the positives within the first K of one query's exact row, the least place in the screen's row (from 1)."""
    ahead = (exact[~truth] >= exact[truth, None]).sum(1)
    place = (proposing >= proposing[truth, None]).sum(1)
    return torch.stack([place[ahead < at].min() if bool((ahead < at).any()) else torch.tensor(0) for at in KS])


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, BLOCK_SCORES // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
