"""Rows of a soft-label store, recomputed by the live teacher and compared with what is stored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from itm.config import Part, Recipe
from itm.data import files
from itm.data.records import Caption
from itm.data.shards import Manifest, Sample, read_manifest, read_samples
from itm.data.sidecar import Sidecar, Store, find_store, teacher_id
from itm.device import resolve_device
from itm.teachers.identity import Modality, build_teacher, choice_of, embed_in_batches
from itm.teachers.shuffled import SHUFFLED, shuffle_of, shuffled_rows
from itm.teachers.stores import stored_identity, stores_root
from pipelines.teaching.driver import MODALITIES

# Of a cosine: rounding to fp16, or to 8 bits with one scale a row; fp32 leaves room for another order of summation.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-2}
# Where another kind of device recomputes than wrote: its kernels sum in other orders, through all layers of the teacher.
ACROSS_DEVICES = {"fp32": 1e-4, "fp16": 3e-3, "int8": 2e-2}


@dataclass(frozen=True)
class Verified:
    """The outcome for one store."""

    modality: str
    teacher: str
    rows: int
    max_dS: float
    max_dv: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.max_dS <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAIL"
        differences = f"max |dS| {self.max_dS:.2e} (allowed {self.tolerance:.0e}), max |dv| {self.max_dv:.2e}"
        return f"{self.modality} {self.teacher}: {self.rows} rows, {differences}: {verdict}"


def verify(recipe: Recipe, split: str | None = None, rows: int = 128, seed: int = 0, device: str | None = None) -> list[Verified]:
    """Recompute `rows` random rows of each store of the recipe on `device`; unset: the kind of device that wrote them, where it is there.

    Raises ValueError when a store is missing, belongs to other shards, its teacher has other weights now, or the device is not there.
    """
    split = split or recipe.data.train_split
    split_uri = files.join(recipe.data.root, split)
    manifest = read_manifest(split_uri)
    results = []
    for modality in MODALITIES:
        part = recipe.teachers.stored.get(modality)
        if part is None:
            continue
        check = _Check(recipe, split_uri, stores_root(recipe, split), manifest, modality, device)
        results.append(check.run(part, rows, seed))
    if not results:
        raise ValueError(f"recipe {recipe.name!r} names no teacher: set teachers.image and/or teachers.text")
    return results


@dataclass(frozen=True)
class _Check:
    recipe: Recipe
    split_uri: str
    root: str
    manifest: Manifest
    modality: Modality
    device: str | None

    def run(self, part: Part, rows: int, seed: int) -> Verified:
        if part.kind == SHUFFLED:
            return self._shuffled(part, rows, seed)
        store = self._store(part)
        teacher = build_teacher(part, self.modality)
        if teacher_id(stored_identity(teacher, store.dtype)) != store.teacher:
            raise ValueError(f"the teacher {part.kind!r} is no longer that of {store.uri}; run `itm teach` with this recipe")
        chosen = _choose({s.name: store.sidecar(s.name, s.sha256) for s in self.manifest.shards}, rows, seed)
        of_a_sample = np.arange(store.views)
        stored = np.concatenate([sidecar.vectors[(at[:, None] + of_a_sample).ravel()].astype(np.float64) for sidecar, at in chosen])
        payloads = [p for sidecar, at in chosen for p in self._payloads(sidecar, at, teacher.prepare)]
        wrote = {sidecar.header.device for sidecar, _ in chosen}
        teacher.to(self.device or _kind_here(wrote))
        live = embed_in_batches(teacher, payloads, self.recipe.teachers.batch_size).astype(np.float64)
        return self._compare(store, stored, live, (TOLERANCE if wrote == {teacher.device.type} else ACROSS_DEVICES)[store.dtype])

    def _shuffled(self, part: Part, rows: int, seed: int) -> Verified:
        """The true store against its live teacher, then every shuffled row against the true row it must be."""
        shuffle = shuffle_of(part)
        true = self.run(shuffle.of, rows, seed)
        store = self._store(part)
        worst = 0.0
        names = [shard.name for shard in self.manifest.shards]
        for name, expected in shuffled_rows(self._store(shuffle.of), self.manifest, shuffle.seed, names):
            found = store.sidecar(name)
            worst = max(worst, float(np.abs(found.vectors - expected.vectors)[found.ok].max(initial=0)))
        # two roundings of a unit vector; a wrong row differs by far more
        moved = 0.0 if worst <= TOLERANCE[store.dtype] else worst
        return Verified(self.modality, store.teacher, true.rows, max(true.max_dS, moved), max(true.max_dv, worst), true.tolerance)

    def _store(self, part: Part) -> Store:
        store = find_store(self.root, choice_of(part, self.modality, self.recipe.teachers.dtype))
        store.check((shard.name, shard.sha256) for shard in self.manifest.shards)
        return store

    def _payloads(self, sidecar: Sidecar, at: np.ndarray, prepare: Callable[[Sample | Caption], bytes]) -> list[bytes]:
        wanted = {(sidecar.keys[row], sidecar.captions[row] if sidecar.captions else "") for row in at}
        found: dict[tuple[str, str], bytes] = {}
        for sample in read_samples(files.join(self.split_uri, sidecar.header.shard)):
            if isinstance(sample, Sample):
                for row in [sample] if self.modality == "image" else sample.captions:
                    name = (sample.key, "" if isinstance(row, Sample) else row.id)
                    if name in wanted:
                        found[name] = prepare(row)
        return [found[sidecar.keys[row], sidecar.captions[row] if sidecar.captions else ""] for row in at]

    def _compare(self, store: Store, stored: np.ndarray, live: np.ndarray, tolerance: float) -> Verified:
        live /= np.linalg.norm(live, axis=1, keepdims=True)
        # a method normalises what it reads, so that is what is compared
        read = stored / np.linalg.norm(stored, axis=1, keepdims=True)
        cosines = float(np.abs(read @ read.T - live @ live.T).max())
        return Verified(self.modality, store.teacher, len(live), cosines, float(np.abs(stored - live).max()), tolerance)


def _kind_here(wrote: set[str]) -> str:
    """The kind of device that wrote, where there is one kind and it is there; else the best there is."""
    with contextlib.suppress(ValueError):
        (kind,) = wrote
        return str(resolve_device(kind))
    return "auto"


def _choose(sidecars: dict[str, Sidecar], rows: int, seed: int) -> list[tuple[Sidecar, np.ndarray]]:
    """(sidecar, sorted row numbers) of up to `rows` random scored rows of the whole split; of several views the first of their sample."""
    scored = [(name, row) for name, s in sidecars.items() for row in np.flatnonzero(s.ok) if row % s.header.views == 0]
    if rows < 2 or len(scored) < 2:
        raise ValueError(f"a cosine needs two rows; asked for {rows} of {len(scored)} scored ones")
    picked = np.random.default_rng(seed).permutation(len(scored))[:rows]
    by_shard: dict[str, list[int]] = {}
    for k in sorted(picked):
        name, row = scored[k]
        by_shard.setdefault(name, []).append(int(row))
    return [(sidecars[name], np.array(at)) for name, at in by_shard.items()]
