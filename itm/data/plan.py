"""The order of training pairs as a pure function of (manifest, seed, epoch), dealt to ranks in batches of equal number and size.

    plan = Plan.of(manifest, seed=0, batch=128, ranks=2, window=8)
    plan.batch_pairs(step=0, micro=0, rank=1)        # (128,2) int64: shard number, caption row in that shard

Shards are permuted; the captions of each `window` shards in a row are permuted together; the stream is cut into global batches,
and the last incomplete one of an epoch is dropped. The stream does not know of ranks: other workers see the same pairs in the same
order. Nothing but the counts of the manifest is read, so a plan of a billion pairs is made in the memory of one window.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, Protocol, cast

import numpy as np

from itm.data.manifest import ShardInfo


@dataclass(frozen=True)
class Position:
    """So many optimiser steps were taken; the next pair is number `offset` of the order of `epoch`."""

    step: int = 0
    epoch: int = 0
    offset: int = 0


class Counted(Protocol):
    """What an order is made from: a manifest, or a mixture of several."""

    @property
    def split(self) -> str: ...

    @property
    def shards(self) -> list[ShardInfo]: ...

    @property
    def captions(self) -> int: ...

    def fingerprint(self) -> str: ...


class Counts(tuple[int, ...]):
    """The captions of each shard. What every step asks of them, of a hundred thousand shards, is found once: their sum, and their hash,
    which is that of the tuple."""

    @cached_property
    def total(self) -> int:
        return sum(self)

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class Plan:
    """counts: captions of each shard. batch: pairs per rank and micro-step. start: where this run (or its resumption) begins."""

    counts: tuple[int, ...]
    manifest: str
    seed: int
    batch: int
    ranks: int = 1
    accumulate: int = 1
    window: int = 8
    start: Position = Position()

    def __post_init__(self) -> None:
        if not isinstance(self.counts, Counts):
            object.__setattr__(self, "counts", Counts(self.counts))

    @classmethod
    def of(cls, manifest: Counted, *, seed: int, batch: int, ranks: int = 1, accumulate: int = 1, window: int = 8) -> Plan:
        """Raises ValueError, with the numbers, when there are fewer pairs than one global batch."""
        plan = cls(tuple(s.captions for s in manifest.shards), manifest.fingerprint(), seed, batch, ranks, accumulate, window)
        if plan.pairs < plan.global_batch:
            raise ValueError(
                f"split {manifest.split!r} has {plan.pairs} pairs in {len(plan.counts)} shards, fewer than one global batch of "
                f"{plan.global_batch} = {batch} (train.batch_size) x {ranks} (workers) x {accumulate} (train.accumulate); lower one of them"
            )
        return plan

    @property
    def pairs(self) -> int:
        return cast(Counts, self.counts).total

    @property
    def global_batch(self) -> int:
        return self.batch * self.ranks * self.accumulate

    @property
    def steps_per_epoch(self) -> int:
        return self.pairs // self.global_batch

    def locate(self, step: int) -> Position:
        """Where step `step` begins. After `start`, a partly consumed epoch is finished first; its incomplete rest is dropped.

        Raises ValueError for a step before `start`.
        """
        ahead = step - self.start.step
        if ahead < 0:
            raise ValueError(f"step {step} lies before step {self.start.step}, where this plan begins")
        first = (self.pairs - self.start.offset) // self.global_batch
        if ahead < first:
            return Position(step, self.start.epoch, self.start.offset + ahead * self.global_batch)
        epochs, inside = divmod(ahead - first, self.steps_per_epoch)
        return Position(step, self.start.epoch + 1 + epochs, inside * self.global_batch)

    def resume(self, position: Position) -> Plan:
        """The same order from `position` on, whatever batch or number of ranks led there."""
        return replace(self, start=position)

    def batch_pairs(self, step: int, micro: int, rank: int) -> np.ndarray:
        """(batch,2) int64 (shard number, caption row) of one rank's micro-step."""
        at = self.locate(step)
        start = at.offset + (micro * self.ranks + rank) * self.batch
        return self.epoch_pairs(at.epoch, start, start + self.batch)

    def epoch_pairs(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """(stop-start,2) int64: pairs [start, stop) of the order of an epoch. Only the windows they lie in are permuted."""
        _, begins = _shard_order(self.counts, self.seed, epoch, self.window)
        first, last = np.searchsorted(begins, [start, stop - 1], side="right") - 1
        windows = [_window_pairs(self.counts, self.seed, epoch, self.window, number) for number in range(first, last + 1)]
        return np.concatenate(windows)[start - begins[first] : stop - begins[first]]

    def digest(self, position: Position) -> str:
        """16 hex digits of what the order was up to `position`: manifest, seed, window and the last pairs before it."""
        said = json.dumps([self.manifest, self.seed, self.window, position.epoch, position.offset])
        last = self.epoch_pairs(position.epoch, max(0, position.offset - 64), position.offset) if position.offset else np.zeros(0)
        return hashlib.sha256(said.encode() + last.tobytes()).hexdigest()[:16]

    def check_digest(self, position: Position, digest: str, where: str) -> None:
        """Raises ValueError naming both digests when a checkpoint was made with another order."""
        if (ours := self.digest(position)) != digest:
            raise ValueError(
                f"{where} was made with another order of the data: its digest is {digest}, this manifest ({self.manifest}), "
                f"seed {self.seed} and window {self.window} give {ours}; restore them, or start afresh with --overwrite"
            )


def window_of(manifest: Counted, shards: int, pairs: int | Literal["all"] | None) -> int:
    """Shards that are shuffled together: as many as hold `pairs` pairs at the mean number a shard, or `shards` where that is unset."""
    if pairs is None:
        return shards
    if pairs == "all":
        return max(1, len(manifest.shards))
    return min(max(1, len(manifest.shards)), math.ceil(pairs * len(manifest.shards) / max(1, manifest.captions)))


def expected_same_image_share(pairs: int, images: int, batch: int) -> float:
    """Expected share of the pairs of a batch whose image stands in another pair of that batch too, in [0, 1].

    pairs: how many are shuffled together, of `images` images with equally many captions each; batch: pairs drawn of them, at most all.
    To a loss that masks the diagonal only, such a pair has a caption of its own image among its negatives.
    """
    others, batch = pairs / images - 1, min(batch, pairs)
    if others <= 0 or batch < 2:
        return 0.0
    if batch - 1 > pairs - 1 - others:
        return 1.0

    def ways(of: float) -> float:
        return math.lgamma(of + 1) - math.lgamma(of - batch + 2)

    return -math.expm1(ways(pairs - 1 - others) - ways(pairs - 1))


@lru_cache(maxsize=4)
def _shard_order(counts: tuple[int, ...], seed: int, epoch: int, window: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The shards of each window, and the first pair of each window."""
    order = np.random.default_rng([seed, epoch]).permutation(len(counts))
    windows = [order[i : i + window] for i in range(0, len(order), window)]
    sizes = [sum(counts[s] for s in shards) for shards in windows]
    return windows, np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64)])


@lru_cache(maxsize=3)
def _window_pairs(counts: tuple[int, ...], seed: int, epoch: int, window: int, number: int) -> np.ndarray:
    """(pairs of the window, 2), permuted."""
    shards = _shard_order(counts, seed, epoch, window)[0][number]
    pairs = np.concatenate([np.stack([np.full(counts[s], s), np.arange(counts[s])], 1) for s in shards])
    return np.random.default_rng([seed, epoch, number + 1]).permutation(pairs).astype(np.int64)
