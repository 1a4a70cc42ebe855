"""UARDA's scoring without the fragments that the threshold prunes: what a word no region passes adds is exactly 0, so it is not computed.

Which words those are depends on the image, so the similarities come first, in one product for all. From the same similarities as the
unpruned engine, the rest (weights, w' G w) is computed for the survivors only, packed together within a tile: see
docs/methods/uarda.md#pruned-inference. The similarities take four fifths of the time and are never saved: report p, the pruned share,
with every gain (docs/methods/uarda.md#pruned-share, `itm bench pruning`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from itm.matchers.late import Prune
from itm.matchers.late.base import gram, parts_of, raw_scores
from itm.matchers.late.tiles import tiled_relevance
from itm.matchers.late.uarda_attention import Attention, packed_tile_relevance, tile_relevance
from itm.types import Encoded, Options

# Pruned share from which packing the survivors costs less than computing all: 0.7 at 36 x 1024 regions on a CPU, near 0.8 at 6 x 128,
# where a tile has little to pack (docs/methods/uarda.md#pruned-share).
BREAK_EVEN = 0.7
PARTS = ("similarity", "survivors", "attention", "pooling")


class Pruning:
    """What `matcher.pruning` does in evaluation, and what it saw. auto: packs from a pruned share of BREAK_EVEN in the first tile on.

    Once it has chosen to compute all, tiles are those of the unpruned engine, and their fragments are no longer counted.
    Scores are those of the unpruned engine up to the rounding of another product shape (1e-6); the mask is from the same similarities.
    """

    def __init__(self, prune: Prune = "auto") -> None:
        """Raises ValueError for an unknown choice."""
        if prune not in ("off", "on", "auto"):
            raise ValueError(f"prune is off, on or auto, not {prune!r}")
        self.prune: Prune = prune
        self.engines: dict[str, str] = {}
        self.fragments = self.pruned = 0
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._since = 0.0
        self._alive = torch.zeros(0, dtype=torch.bool)

    def scores(self, direction: str, query: Encoded, context: Encoded, attention: Attention, t: Tensor | float) -> Tensor:
        """(Nc,Nq): mean of r over the valid query items, pruned ones included."""
        (queries, query_mask), (items, context_mask) = parts_of(query), parts_of(context)
        self._since = time.process_time()
        raw, grams = raw_scores(queries, items), gram(items)
        self._spent("similarity")
        top = raw.amax(-1) if bool(context_mask.all()) else raw.masked_fill(~context_mask[:, None, None, :], -torch.inf).amax(-1)
        alive = (top > t) & query_mask
        valid, kept = len(items) * int(query_mask.sum()), int(alive.sum())
        self.fragments += valid
        self.pruned += valid - kept
        self._spent("survivors")
        if self._engine(direction, 1 - kept / valid, attention.weights) == "packed":
            relevance = torch.zeros(alive.shape, dtype=raw.dtype, device=raw.device)
            relevance[alive] = packed_relevance(raw, grams, context_mask, alive, attention, t)
        else:
            relevance = attention.relevance(raw, grams, context_mask, t)
        self._spent("attention")
        scores = (relevance * query_mask).sum(-1) / query_mask.sum(-1)
        self._spent("pooling")
        return scores

    def tiles(
        self, images: Encoded, captions: Encoded, direction: str, t: float, smooth: float
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """What `tiled_relevance` gives of softmax weights, computed for the surviving fragments of a tile only."""
        self._since = time.process_time()
        relate = functools.partial(self._relate, direction, t, smooth)
        for tile in tiled_relevance(images, captions, direction, relate, context_first=True):
            yield tile
            mask = tile[3].T
            self.fragments += len(self._alive) * int(mask.sum())
            self.pruned += int((mask & ~self._alive).sum())
            self._spent("pooling")

    def _relate(self, direction: str, t: float, smooth: float, raw: Tensor, grams: Tensor, context_mask: Tensor | None) -> Tensor:
        self._spent("similarity")
        if context_mask is not None:
            raw = raw.masked_fill(~context_mask.T[..., None, None], t)
        self._alive = raw.amax(0) > t
        share = 1 - float(self._alive.sum()) / self._alive.numel()
        self._spent("survivors")
        if self._engine(direction, share, "softmax") == "packed":
            relevance = packed_tile_relevance(raw, grams, self._alive, t, smooth)
        else:
            relevance = tile_relevance(raw.transpose(0, 1), grams, None, t, smooth)
        self._spent("attention")
        return relevance

    def report(self) -> Options:
        """engine {direction: packed | all}, p (pruned share of all fragments), share_of_time {part: share of CPU time}."""
        total = sum(self.seconds.values()) or 1.0
        shares = {part: round(seconds / total, 4) for part, seconds in self.seconds.items()}
        return {
            "prune": self.prune,
            "engine": self.engines,
            "p": self.pruned / self.fragments if self.fragments else None,
            "share_of_time": shares,
        }

    def _engine(self, direction: str, share: float, weights: str) -> str:
        if direction not in self.engines:
            packs = self.prune == "on" or (self.prune == "auto" and share >= BREAK_EVEN)
            # `scan` weights are normalised over the words of a caption: no row can be computed alone.
            self.engines[direction] = "packed" if packs and weights != "scan" else "all"
        return self.engines[direction]

    def _spent(self, part: str) -> None:
        now = time.process_time()
        self.seconds[part] += now - self._since
        self._since = now


def packed_relevance(raw: Tensor, grams: Tensor, context_mask: Tensor, alive: Tensor, attention: Attention, t: Tensor | float) -> Tensor:
    """(n,): r of the fragments `alive` (Nc,Nq,Q), in their order. raw (Nc,Nq,Q,C), grams (Nc,C,C); see `Attention.relevance`."""
    rows, counts = raw[alive], alive.sum((1, 2))
    masks = context_mask.repeat_interleave(counts, 0)
    e = attention.unnormalised(rows[:, None, None], masks, t)[:, 0, 0]
    with torch.autocast(raw.device.type, enabled=False):
        turned = torch.cat([part @ own for part, own in zip(e.split(counts.tolist()), grams, strict=True)])
    square = (turned * e).sum(-1)
    passes = square > 1e-16
    return torch.where(passes, (e * rows).sum(-1) / torch.where(passes, square, 1.0).sqrt(), 0.0)
