"""What soft-label stores look like to a method: how sharp, how equal, how true their soft labels are, and which samples they hold alike.

Everything is measured on a fixed sample, so that a store of any size is looked at in seconds: the shards in the order of a seeded
permutation until `SAMPLES` samples are there, of these `BATCHES` batches of different samples, one row a sample, as training draws them.
Stores that are given together are measured on the same samples, so their figures can be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from itm.data.sidecar import Sidecar, Store

TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SAMPLES, BATCHES, QUERIES, NEIGHBOURS = 4096, 4, 20, 10
LEAST_TAU, MOST_TAU, OWN = 0.01, 1.0, 0.5
_PERMUTATIONS = 20
_CHUNK = 1024

Place = tuple[str, str]
"""(shard name, sample key): a key is unique in its shard only."""


@dataclass(frozen=True)
class Row:
    """A row of a store: its sample, the id of its caption ("" in an image store), and the cosine to the row that was asked for."""

    place: Place
    caption: str
    score: float = 1.0


@dataclass(frozen=True)
class Neighbours:
    """A row, and the rows of other samples that are nearest to it, the nearest first."""

    query: Row
    found: list[Row]


@dataclass(frozen=True)
class Figures:
    """What is known of one store. All but `rows` and `scored` are means over the batches.

    entropy, off: by temperature, the entropy (nats) of a row of the soft labels and its mass off the diagonal; equal: share of a batch's
    rows whose vector another row of the batch has, too; cosine, deviation: of two different samples; tau: the suggested temperature, None
    where none parts a row from the others; words: correlation of the cosines with those of the captions' words, and the largest that
    `_PERMUTATIONS` random orders of the samples gave (None without shards); agreement: correlation with the other stores, by their number.
    """

    store: Store
    batch: int
    rows: int
    scored: int
    entropy: dict[float, float]
    off: dict[float, float]
    equal: float
    cosine: float
    deviation: float
    tau: float | None
    words: tuple[float, float] | None
    agreement: list[float]
    neighbours: list[Neighbours] = field(repr=False)

    @property
    def constant(self) -> bool:
        """Whether all vectors of the sample are equal: such soft labels say nothing."""
        return self.equal == 1 and self.deviation < 1e-6 and self.cosine > 1 - 1e-3

    @property
    def remarks(self) -> list[str]:
        """What is wrong with it, or may be."""
        if self.constant:
            return ["constant: all vectors are equal, the soft labels say nothing; mend the teacher"]
        said = []
        if self.words and not self.words[0] > self.words[1]:
            said.append("agrees with the captions no more than chance: a shuffled control, or vectors of other images")
        if self.scored < self.rows:
            said.append(f"{self.rows - self.scored:,} rows have no vector: quarantine.jsonl says why")
        return said


Words = Callable[[Sequence[Place]], list[str]]
"""All captions of each sample as one text."""


def inspect_stores(stores: Sequence[Store], batch: int = 128, seed: int = 0, words: Words | None = None) -> list[Figures]:
    """The figures of stores of one split, on the same samples. words: the captions, where the shards are there.

    Raises ValueError when fewer than two samples have a vector in every store, or a store is damaged.
    """
    chosen = _choose(stores, seed)
    drawn = np.random.default_rng(seed)
    size, asked = min(batch, len(chosen.places)), min(QUERIES, len(chosen.places))
    queries, *batches = (_draw(chosen.places, n, drawn) for n in (asked, *[size] * BATCHES))
    spoken = [_word_cosines(words(b.samples)) for b in batches] if words else None
    cosines = [[_cosines(chosen.vectors(number, b)) for b in batches] for number in range(len(stores))]
    return [
        Figures(
            store=store,
            batch=size,
            rows=sum(shard["rows"] for shard in store.shards.values()),
            scored=sum(shard["rows"] - shard["rejected"] for shard in store.shards.values()),
            **_sharpness(cosines[number], [_equal(chosen.vectors(number, b)) for b in batches]),
            words=_agreement_by_chance(cosines[number], spoken, seed) if spoken else None,
            agreement=[_agreement(cosines[number], other) for other in cosines],
            neighbours=list(_neighbours(chosen, number, queries)),
        )
        for number, store in enumerate(stores)
    ]


# --- the sample ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Different samples, and for each where among its rows the one lies that is drawn (0 to 1)."""

    places: Sequence[Place]
    order: np.ndarray
    where: np.ndarray

    @property
    def samples(self) -> list[Place]:
        return [self.places[k] for k in self.order]


def _draw(places: Sequence[Place], size: int, drawn: np.random.Generator) -> _Batch:
    return _Batch(places, drawn.permutation(len(places))[:size], drawn.random(size))


@dataclass(frozen=True)
class _Chosen:
    """places: the samples with a vector in every store; sidecars, rows: of each store, by shard and by place."""

    places: list[Place]
    sidecars: list[dict[str, Sidecar]]
    rows: list[dict[Place, list[int]]]

    def picked(self, number: int, batch: _Batch) -> list[tuple[Place, int]]:
        rows = self.rows[number]
        return [(place, rows[place][int(u * len(rows[place]))]) for place, u in zip(batch.samples, batch.where, strict=True)]

    def vectors(self, number: int, batch: _Batch) -> np.ndarray:
        """(B, D) as stored."""
        return np.stack([self.sidecars[number][place[0]].vectors[row] for place, row in self.picked(number, batch)])


def _choose(stores: Sequence[Store], seed: int) -> _Chosen:
    shards = sorted(set.intersection(*(set(store.shards) for store in stores)))
    sidecars: list[dict[str, Sidecar]] = [{} for _ in stores]
    rows: list[dict[Place, list[int]]] = [{} for _ in stores]
    places: list[Place] = []
    for k in np.random.default_rng(seed).permutation(len(shards)):
        name = shards[k]
        for number, store in enumerate(stores):
            sidecar = sidecars[number][name] = store.sidecar(name, store.shards[name]["sha256"])
            for row in np.flatnonzero(sidecar.ok):
                rows[number].setdefault((name, sidecar.keys[row]), []).append(int(row))
        places += [place for place in rows[0] if place[0] == name and all(place in other for other in rows)]
        if len(places) >= SAMPLES:
            break
    if len(places) < 2:
        raise ValueError(f"{stores[0].uri}: {len(places)} samples with a vector in every store; a soft label needs two")
    return _Chosen(places, sidecars, rows)


# --- figures ------------------------------------------------------------------------------------------------------------------


def _unit(vectors: np.ndarray) -> np.ndarray:
    """As a method reads them: float32, and the length that rounding took is given back."""
    whole = vectors.astype(np.float32)
    return whole / np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-12)


def _cosines(vectors: np.ndarray) -> np.ndarray:
    unit = _unit(vectors).astype(np.float64)
    return unit @ unit.T


def _equal(vectors: np.ndarray) -> np.ndarray:
    """(B, B) bool: which rows hold the same stored vector; the diagonal is True."""
    _, kind = np.unique(vectors, axis=0, return_inverse=True)
    return kind.reshape(-1)[:, None] == kind.reshape(-1)[None]


def soft_labels(cosines: np.ndarray, tau: float) -> np.ndarray:
    """(B, B): each row the softmax of its cosines over the temperature."""
    logits = cosines / tau
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _sharpness(cosines: Sequence[np.ndarray], equal: Sequence[np.ndarray]) -> dict[str, Any]:
    entropy, off = {}, {}
    for tau in TEMPERATURES:
        labels = [soft_labels(c, tau) for c in cosines]
        entropy[tau] = float(np.mean([-(y * np.log(np.maximum(y, 1e-300))).sum(1).mean() for y in labels]))
        off[tau] = float(np.mean([1 - np.diag(y).mean() for y in labels]))
    apart = np.concatenate([_off_diagonal(c) for c in cosines])
    return {
        "entropy": entropy,
        "off": off,
        "equal": float(np.mean([(e.sum(1) > 1).mean() for e in equal])),
        "cosine": float(apart.mean()),
        "deviation": float(apart.std()),
        "tau": suggested_tau(cosines, equal),
    }


def suggested_tau(cosines: Sequence[np.ndarray], equal: Sequence[np.ndarray]) -> float | None:
    """The temperature at which half of a row's mass stays on the row itself and on those with an equal vector; two digits.

    docs/teachers.md says why. None where less than half stays at `LEAST_TAU` already, or where all vectors are equal; at most `MOST_TAU`.
    """

    def own(tau: float) -> float:
        return float(np.mean([(soft_labels(c, tau) * e).sum(1).mean() for c, e in zip(cosines, equal, strict=True)]))

    if own(LEAST_TAU) < OWN or all(e.all() for e in equal):
        return None
    low, high = LEAST_TAU, MOST_TAU
    if own(high) >= OWN:
        return high
    while high / low > 1.001:  # own falls as the temperature rises
        middle = math.sqrt(low * high)
        low, high = (middle, high) if own(middle) >= OWN else (low, middle)
    return float(f"{low:.2g}")


def _off_diagonal(square: np.ndarray) -> np.ndarray:
    return np.asarray(square[~np.eye(len(square), dtype=bool)])


def _agreement(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Correlation of the cosines of different samples, mean over the batches; 0 where one of them does not vary."""
    return float(np.mean([_correlation(_off_diagonal(a), _off_diagonal(b)) for a, b in zip(one, other, strict=True)]))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if min(a.std(), b.std()) < 1e-6:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _agreement_by_chance(cosines: Sequence[np.ndarray], spoken: Sequence[np.ndarray], seed: int) -> tuple[float, float]:
    drawn = np.random.default_rng(seed)
    by_chance = []
    for _ in range(_PERMUTATIONS):
        orders = [drawn.permutation(len(c)) for c in cosines]
        by_chance.append(_agreement([c[np.ix_(o, o)] for c, o in zip(cosines, orders, strict=True)], spoken))
    return _agreement(cosines, spoken), max(by_chance)


def _word_cosines(texts: Sequence[str]) -> np.ndarray:
    """(B, B) cosines of the texts' sets of words; a word counts the less, the more of the texts have it."""
    sets = [set(re.findall(r"\w+", text.lower())) for text in texts]
    column = {word: k for k, word in enumerate(sorted(set().union(*sets)))}
    table = np.zeros((len(texts), len(column) or 1), np.float32)
    for row, found in enumerate(sets):
        table[row, [column[word] for word in found]] = 1
    seen = table.sum(0)
    return _cosines(table * np.log(len(texts) / np.maximum(seen, 1)))


# --- neighbours ---------------------------------------------------------------------------------------------------------------


def _neighbours(chosen: _Chosen, number: int, batch: _Batch) -> Iterator[Neighbours]:
    """The nearest rows of other samples, among all rows of the chosen shards."""
    asked = chosen.picked(number, batch)
    queries = _unit(chosen.vectors(number, batch))
    names: list[Row] = []
    scores = [np.zeros((0, len(asked)), np.float32)]
    for shard, sidecar in chosen.sidecars[number].items():
        ok = np.flatnonzero(sidecar.ok)
        names += [_row(sidecar, shard, int(row)) for row in ok]
        scores += [_unit(sidecar.vectors[ok[start : start + _CHUNK]]) @ queries.T for start in range(0, len(ok), _CHUNK)]
    table = np.concatenate(scores)
    for column, (place, row) in enumerate(asked):
        order = np.argsort(-table[:, column], kind="stable")
        others = (k for k in order if names[k].place != place)
        found = [Row(names[k].place, names[k].caption, float(table[k, column])) for k, _ in zip(others, range(NEIGHBOURS), strict=False)]
        yield Neighbours(_row(chosen.sidecars[number][place[0]], place[0], row), found)


def _row(sidecar: Sidecar, shard: str, row: int) -> Row:
    return Row((shard, sidecar.keys[row]), sidecar.captions[row] if sidecar.captions else "")


def as_text(figures: Sequence[Figures]) -> str:
    """The figures side by side, one column a store."""
    names = [f"  [{n}] {f.store.modality} {f.store.teacher}: {f.store.width} wide, {f.store.dtype}" for n, f in enumerate(figures, 1)]
    rows = table_of(figures)
    width = max(len(label) for label in rows)
    head = f"  {'':<{width}}" + "".join(f"{f'[{n}]':>16}" for n in range(1, len(figures) + 1))
    lines = [f"  {label:<{width}}" + "".join(f"{cell:>16}" for cell in cells) for label, cells in rows.items()]
    remarks = [f"  [{n}] {said}" for n, f in enumerate(figures, 1) for said in f.remarks]
    return "\n".join([*names, head, *lines, *remarks])


def table_of(figures: Sequence[Figures]) -> Mapping[str, list[str]]:
    """Label -> a cell a store."""
    flat = math.log(figures[0].batch)
    rows = {
        "rows": [f"{f.rows:,}" for f in figures],
        "coverage": [f"{f.scored / max(f.rows, 1):.1%}" for f in figures],
        f"equal vectors in a batch of {figures[0].batch}": [f"{f.equal:.1%}" for f in figures],
        "cosine of two samples": [f"{f.cosine:.3f} ± {f.deviation:.3f}" for f in figures],
        "agrees with the captions' words": [f"{f.words[0]:.2f}" if f.words else "-" for f in figures],
        "  by chance at most": [f"{f.words[1]:.2f}" if f.words else "-" for f in figures],
    }
    if len(figures) > 1:
        for other in range(len(figures)):
            rows[f"agrees with [{other + 1}]"] = ["" if f is figures[other] else f"{f.agreement[other]:.2f}" for f in figures]
    for tau in TEMPERATURES:
        rows[f"entropy at {tau:g} (flat: {flat:.2f})"] = [f"{f.entropy[tau]:.2f}" for f in figures]
    for tau in TEMPERATURES:
        rows[f"off the diagonal at {tau:g}"] = [f"{f.off[tau]:.1%}" for f in figures]
    rows["suggested temperature"] = ["none" if f.tau is None else f"{f.tau:g}" for f in figures]
    return rows
