"""Several packed roots as one training split: `data.mix: [{root: ..., weight: ...}, ...]`.

A mixture stands where a manifest stands, its plan where a plan stands: the n-th pair is a function of the manifests, the weights and the
seed, so a run goes on from a position, with any number of ranks, as with one source. Of each whole number of blocks of 4,096 pairs each
root has given its share, less than one pair a root off. A root that comes to its end begins again in another order; an epoch is as many
pairs as all roots hold.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Self

import numpy as np

from itm.data.manifest import Manifest, ShardInfo
from itm.data.plan import Plan
from itm.data.sidecar import Sidecar, Store

_BLOCK = 4096  # pairs over which the roots are interleaved at random
_STREAM = 1_000_003  # between the seeds of two roots


@dataclass(frozen=True)
class Mixture:
    """uris: the split folder of each root. What else it has is what a manifest has, over the shards of all roots in order."""

    split: str
    uris: tuple[str, ...]
    weights: tuple[float, ...]
    manifests: tuple[Manifest, ...]

    @property
    def shards(self) -> list[ShardInfo]:
        return [shard for manifest in self.manifests for shard in manifest.shards]

    @property
    def samples(self) -> int:
        return sum(manifest.samples for manifest in self.manifests)

    @property
    def captions(self) -> int:
        return sum(manifest.captions for manifest in self.manifests)

    def fingerprint(self) -> str:
        """12 hex digits over the fingerprints of the manifests and their weights."""
        rows = [[manifest.fingerprint(), weight] for manifest, weight in zip(self.manifests, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]

    def check_captioned(self, uri: str, purpose: str) -> Self:
        """Raises ValueError as `Manifest.check_captioned`, naming the root; `uri` stands for them all."""
        for place, manifest in zip(self.uris, self.manifests, strict=True):
            manifest.check_captioned(place, purpose)
        return self

    def root_of(self, shards: np.ndarray) -> np.ndarray:
        """Which root each of these shard numbers is of."""
        ends = np.cumsum([len(manifest.shards) for manifest in self.manifests])
        return np.searchsorted(ends, shards, side="right")


def parts_of(split_uri: str, manifest: Manifest | Mixture) -> list[tuple[str, Manifest]]:
    """(split folder, manifest) of each root; of a plain manifest itself."""
    if isinstance(manifest, Mixture):
        return list(zip(manifest.uris, manifest.manifests, strict=True))
    return [(split_uri, manifest)]


def folders_of(split_uri: str, manifest: Manifest | Mixture) -> list[str]:
    """The folder that each shard lies in."""
    return [uri for uri, part in parts_of(split_uri, manifest) for _ in part.shards]


@dataclass(frozen=True)
class MixedStore:
    """The soft-label stores of one teacher, one a root, where one store stands. A shard is known by its name and sha256."""

    stores: tuple[Store, ...]

    def __post_init__(self) -> None:
        if len(teachers := {store.teacher: store.uri for store in self.stores}) > 1:
            raise ValueError(
                f"the roots of data.mix were taught by different teachers, {' and '.join(teachers.values())}: run `itm teach` again"
            )

    @property
    def teacher(self) -> str:
        return self.stores[0].teacher

    @property
    def crops(self) -> int | None:
        return self.stores[0].crops

    @property
    def views(self) -> int:
        return self.stores[0].views

    def sidecar(self, shard: str, sha256: str | None = None) -> Sidecar:
        """Raises ValueError as `Store.sidecar`."""
        for store in self.stores:
            if store.shards.get(shard, {}).get("sha256") == sha256:
                return store.sidecar(shard, sha256)
        raise ValueError(f"no root of data.mix has a sidecar of {shard} with sha256 {str(sha256)[:12]}: run `itm teach` again")


@dataclass(frozen=True)
class MixedPlan(Plan):
    """As `Plan`, of a mixture. roots: shards of each; weights: of each."""

    roots: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    @classmethod
    def of(cls, manifest: Any, **given: Any) -> MixedPlan:
        """Raises ValueError as `Plan.of`, and for a root without captions."""
        plan = super().of(manifest, **given)
        assert isinstance(plan, MixedPlan)
        return replace(plan, roots=tuple(len(m.shards) for m in manifest.manifests), weights=manifest.weights)

    def epoch_pairs(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """(stop-start,2) int64: pairs [start, stop) of an epoch; shard numbers run over all roots."""
        begin, end = epoch * self.pairs + start, epoch * self.pairs + stop
        first, last = begin // _BLOCK, (end - 1) // _BLOCK
        order = (self.counts, self.roots, self.weights, self.seed, self.window)
        blocks = np.concatenate([_block(order, number) for number in range(first, last + 1)])
        return blocks[begin - first * _BLOCK : end - first * _BLOCK]


def plan_of(manifest: Manifest | Mixture, **given: Any) -> Plan:
    """The plan of a split, or of a mixture."""
    return MixedPlan.of(manifest, **given) if isinstance(manifest, Mixture) else Plan.of(manifest, **given)


def drawn(weights: tuple[float, ...], pairs: int) -> list[int]:
    """How many of the first `pairs` pairs each root gives: whole numbers that never fall, add up to `pairs`, and are less than the number
    of roots off weight x pairs."""
    rest, left, counts = pairs, sum((Fraction(str(w)) for w in weights), Fraction(0)), []
    for weight in map(Fraction, map(str, weights)):
        counts.append(int(rest * weight / left))
        rest, left = rest - counts[-1], left - weight
    return counts


@lru_cache(maxsize=4)
def _block(order: tuple[Any, ...], number: int) -> np.ndarray:
    """(_BLOCK,2): the pairs of one block, the roots interleaved at random."""
    counts, roots, weights, seed, window = order
    before, after = drawn(weights, number * _BLOCK), drawn(weights, (number + 1) * _BLOCK)
    labels = np.repeat(np.arange(len(roots)), np.subtract(after, before))
    labels = labels if len(roots) == 1 else np.random.default_rng([seed, len(roots), number]).permutation(labels)
    pairs = np.empty((_BLOCK, 2), np.int64)
    first = 0
    for root, shards in enumerate(roots):
        plan = Plan(counts[first : first + shards], "", seed + _STREAM * root, 1, window=window)
        pairs[labels == root] = _stream(plan, before[root], after[root]) + np.array([first, 0])
        first += shards
    return pairs


def _stream(plan: Plan, start: int, stop: int) -> np.ndarray:
    """Pairs [start, stop) of one root, epoch after epoch."""
    pieces = [np.zeros((0, 2), np.int64)]
    while start < stop:
        epoch, offset = divmod(start, plan.pairs)
        end = min(plan.pairs, offset + stop - start)
        pieces.append(plan.epoch_pairs(epoch, offset, end))
        start += end - offset
    return np.concatenate(pieces)
