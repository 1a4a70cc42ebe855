"""What pruning by UARDA's threshold saves: `itm bench pruning`.

The paper states 50 to 73 % less retrieval time. Two engines score the same parts with and without pruning, at thresholds that prune a
share p of all fragments: ours (tiles, w' G w, `itm.matchers.late.uarda_pruned`), and one that builds the attended vector of every
fragment, as published loops do. `product` is what must be computed to know what is pruned: nothing that prunes by similarity can cost less.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from itm.benchmarks.measuring import World, alternate
from itm.evaluation.scoring import score_matrix
from itm.matchers.late.base import parts_of, raw_scores
from itm.matchers.late.tiles import tiled_relevance
from itm.matchers.late.uarda import UARDA
from itm.matchers.late.uarda_pruned import Pruning

SHARES = (0.0, 0.3, 0.5, 0.7, 0.9, 0.98)
SMOOTH = 20.0
WORDS = 2000  # of a tile of the engine that builds vectors, which is slower with all of them at once
SAMPLE = 200  # captions, and 50 images, from which thresholds are taken


@dataclass(frozen=True)
class Row:
    """Seconds (CPU; GPU: wall) of all pairs at one pruned share p, medians; difference: largest between pruned and unpruned scores."""

    direction: str
    p: float
    t: float
    ours: float
    ours_pruned: float
    product: float
    vectors: float | None
    vectors_pruned: float | None
    difference: float

    @property
    def saved(self) -> float:
        return 1 - self.ours_pruned / self.ours

    @property
    def most(self) -> float:
        """What pruning can save at p: all that comes after the product, of the pruned share."""
        return (1 - self.product / self.ours) * self.p


@torch.no_grad()
def measure(where: World, rounds: int, device: str, directions: tuple[str, ...] = ("t2i", "i2t")) -> list[Row]:
    """A row for each direction and share; the engine that builds vectors knows t2i only."""
    return [_row(where, direction, share, rounds, device) for direction in directions for share in SHARES]


def _row(where: World, direction: str, share: float, rounds: int, device: str) -> Row:
    matcher = UARDA(vocab_size=4, direction=direction, eval_threshold=threshold_at(where, direction, share))  # type: ignore[arg-type]
    matcher.eval().to(device)
    t = float(matcher.eval_threshold)
    pruning = Pruning("on")

    def scores(pruned: Pruning | None) -> Tensor:
        matcher.pruning = pruned
        return score_matrix(matcher, where.images, where.captions, device=device)

    def product() -> Tensor:
        relate = lambda raw, grams, mask: raw[:, 0]
        for tile in tiled_relevance(where.images, where.captions, direction, relate):
            last = tile[2]
        return last

    works: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: scores(None),
        "pruned": lambda: scores(pruning),
        "product": product,
    }
    if direction == "t2i":
        works |= {"vectors": lambda: with_vectors(where, t, False), "vectors pruned": lambda: with_vectors(where, t, True)}
    spans, _, results = alternate(works, rounds, device)
    spent = {name: statistics.median(span[device != "cpu"] for span in spans[name]) for name in works}
    difference = float((results["ours"] - results["pruned"]).abs().max())
    if direction == "t2i":
        difference = max(difference, float((results["vectors"] - results["vectors pruned"]).abs().max()))
    p = float(pruning.report()["p"])
    seconds = (spent["ours"], spent["pruned"], spent["product"], spent.get("vectors"), spent.get("vectors pruned"))
    return Row(direction, p, t, *seconds, difference)


def threshold_at(where: World, direction: str, share: float) -> float:
    """The threshold that prunes this share of the fragments of a sample; -0.99, which prunes none, for 0."""
    regions, (words, mask) = parts_of(where.images)[0][:50], parts_of(where.captions)
    found = []
    for start in range(0, SAMPLE, 20):
        real = mask[start : start + 20]
        raw = raw_scores(words[start : start + 20], regions)  # (I,T,L,R)
        if direction == "t2i":
            found.append(raw.amax(-1)[:, real].flatten())
        else:
            found.append(raw.masked_fill(~real[None, :, :, None], -torch.inf).amax(2).flatten())
    return float(torch.cat(found)[::3].quantile(share)) if share else -0.99


def with_vectors(where: World, t: float, pruned: bool) -> Tensor:
    """(I,W) r of every word with every image, by attended vectors (W,D) that are built, image by image in tiles of words."""
    regions, (words, mask) = parts_of(where.images)[0], parts_of(where.captions)
    flat = words[mask]
    relevance = flat.new_zeros(len(regions), len(flat))
    for start in range(0, len(flat), WORDS):
        asked = flat[start : start + WORDS]
        for image, own in enumerate(regions):
            raw, chosen, rows = asked @ own.T, asked, slice(start, start + len(asked))
            if pruned:
                alive = (raw.amax(1) > t).nonzero().squeeze(1)
                raw, chosen, rows = raw.index_select(0, alive), asked.index_select(0, alive), start + alive
            e = ((raw - t) * SMOOTH).exp_() * (raw > t)
            attended = e @ own
            norm = attended.square().sum(1).sqrt()
            relevance[image, rows] = torch.where(norm > 0, (attended * chosen).sum(1) / norm, 0.0)
    return relevance


def table(rows: list[Row]) -> str:
    heads = ["p", "t", "ours s", "pruned s", "saved", "at most", "product", "vectors s", "pruned s", "saved", "max |d|"]
    lines = [f"{'':<5}" + "".join(f"{head:>10}" for head in heads)]
    for r in rows:
        mine = f"{r.p:>10.2f}{r.t:>10.3f}{r.ours:>10.2f}{r.ours_pruned:>10.2f}{r.saved:>10.0%}{r.most:>10.0%}{r.product / r.ours:>10.0%}"
        theirs = f"{'':>30}"
        if r.vectors and r.vectors_pruned:
            theirs = f"{r.vectors:>10.2f}{r.vectors_pruned:>10.2f}{1 - r.vectors_pruned / r.vectors:>10.0%}"
        lines.append(f"{r.direction:<5}{mine}{theirs}{r.difference:>10.0e}")
    return "\n".join(lines)
