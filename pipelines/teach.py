"""Score shards with frozen teachers: one soft-label store per teacher, one Arrow sidecar per shard.

    itm teach -c demo.yaml
    itm teach -c coco.yaml --split val teachers.text.kind=minilm

teachers.image and teachers.text name the teachers; `{kind: shuffled, options: {of: {kind: ...}, seed: 7}}` is the control whose
vectors belong to other images. Stores lie below <data.root>/<split>/teachers (or <teachers.root>/<split>). Shards that have a valid sidecar
are kept, so it can be stopped at any time and run again: the store ends with the same bytes. Rows that could not be scored keep
their place, are listed in quarantine.jsonl, and fail the stage past data.max_reject_rate.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from itm.config import Part, Recipe
from itm.data import files, sidecar
from itm.data.manifest import check_present
from itm.data.records import Problem
from itm.data.shards import Manifest, Sample, ShardInfo, read_manifest, read_samples
from itm.device import resolve_device
from itm.teachers.identity import Modality, Teacher, build_teacher, choice_of, embed_in_batches
from itm.teachers.shuffled import SHUFFLED, shuffle_of, shuffled_identity, shuffled_rows
from pipelines.cli import recipe_arguments, recipe_from

ACTOR_CPUS = 0.25
MODALITIES: tuple[Modality, ...] = ("image", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--split", help="which split to score (default: data.train_split)")


def run(args: argparse.Namespace) -> None:
    for modality, uri in teach(recipe_from(args), args.split).items():
        print(f"{modality}: {uri}")


def teach(recipe: Recipe, split: str | None = None) -> dict[str, str]:
    """Make (or complete) the stores that a recipe asks for; returns modality -> store URI.

    Raises ValueError when no teacher is named, nothing can be written, a teacher gives unusable vectors, or too many rows are rejected.
    """
    split = split or recipe.data.train_split
    parts: dict[Modality, Part] = {m: part for m in MODALITIES if (part := getattr(recipe.teachers, m)) is not None}
    if not parts:
        raise ValueError(f"recipe {recipe.name!r} names no teacher: set teachers.image and/or teachers.text")
    return {modality: _make_store(Job.of(recipe, split, modality, part)) for modality, part in parts.items()}


def stores_root(recipe: Recipe, split: str) -> str:
    """The folder of a split's stores, absolute when local (workers have another working directory)."""
    root = recipe.teachers.root
    uri = files.join(root, split) if root else files.join(recipe.data.root, split, "teachers")
    return uri if "://" in uri else os.path.abspath(uri)


def store_for(recipe: Recipe, split: str, modality: str) -> sidecar.Store:
    """The finished store of the recipe's teacher, which it must name; no teacher is loaded.

    Raises ValueError naming the folder and the remedy when `itm teach` has not made it.
    """
    return sidecar.find_store(stores_root(recipe, split), choice_of(getattr(recipe.teachers, modality), modality, recipe.teachers.dtype))


@dataclass(frozen=True)
class Job:
    """One store to make."""

    recipe: Recipe
    split: str
    modality: Modality
    part: Part
    split_uri: str
    root: str
    manifest: Manifest

    @classmethod
    def of(cls, recipe: Recipe, split: str, modality: Modality, part: Part) -> Job:
        folder = files.join(recipe.data.root, split)
        folder = folder if "://" in folder else os.path.abspath(folder)
        root = stores_root(recipe, split)
        files.check_writable(root)
        manifest = read_manifest(folder)
        check_present(folder, manifest)
        return cls(recipe, split, modality, part, folder, root, manifest)

    @property
    def choice(self) -> dict[str, Any]:
        return choice_of(self.part, self.modality, self.recipe.teachers.dtype)

    def header(self, shard: ShardInfo, identity: dict[str, Any]) -> sidecar.Header:
        return sidecar.Header(identity, self.modality, self.recipe.teachers.dtype, shard.name, shard.sha256)


def _make_store(job: Job) -> str:
    """Everything that has no valid sidecar yet, then the receipt of the whole."""
    if job.part.kind == SHUFFLED:
        shuffle = shuffle_of(job.part)
        base = sidecar.open_store(_make_store(replace(job, part=shuffle.of)))
        identity = shuffled_identity(base.identity, shuffle.seed, job.manifest)
        work = partial(_permute, base=base, seed=shuffle.seed)
    else:
        teacher = build_teacher(job.part, job.modality)
        identity = stored_identity(teacher, job.recipe.teachers.dtype)
        work = partial(_score, prepare=teacher.prepare)
        del teacher  # its weights would lie beside those of the actors
    uri = files.join(job.root, sidecar.teacher_id(identity))
    with ThreadPoolExecutor(8) as pool:  # headers are small reads, one a shard
        done = list(pool.map(lambda shard: _is_done(uri, shard, identity), job.manifest.shards))
    todo = [s for s, is_done in zip(job.manifest.shards, done, strict=True) if not is_done]
    started = time.perf_counter()
    written = list(_progress(work(job, uri, todo, identity), len(todo), f"teach {job.split} {job.modality}"))
    counts = {"shards_scored": len(todo), "rows_scored": sum(w.rows for w in written), "seconds": time.perf_counter() - started}
    return _finish(job, uri, identity, counts | busy(written))


def stored_identity(teacher: Teacher, dtype: str) -> dict[str, Any]:
    """The identity of a store: the teacher's, and how its vectors are kept."""
    return {**teacher.identity, "stored_as": dtype}


def _is_done(store: str, shard: ShardInfo, identity: dict[str, Any]) -> bool:
    header = sidecar.read_header(sidecar.sidecar_uri(store, shard.name))
    if header is None or header.shard_sha256 != shard.sha256 or header.format != sidecar.FORMAT:
        return False
    return sidecar.teacher_id(header.identity) == sidecar.teacher_id(identity)


@dataclass(frozen=True)
class Written:
    """A sidecar that was written: its rows, and when (seconds since 1970) which teacher actor had it in hand."""

    rows: int
    actor: str = ""
    began: float = 0.0
    ended: float = 0.0


def busy(written: Sequence[Written]) -> dict[str, float]:
    """`actor_busy`: share of their time, from an actor's first shard to the last of all, that the actors did not wait for decoded rows."""
    actors = {w.actor for w in written if w.actor}
    if not actors:
        return {}
    end = max(w.ended for w in written)
    alive = sum(end - min(w.began for w in written if w.actor == actor) for actor in actors)
    return {"actor_busy": sum(w.ended - w.began for w in written) / alive}


def _progress(written: Iterator[Written], total: int, title: str) -> Iterator[Written]:
    from tqdm import tqdm

    return iter(tqdm(written, title, total, unit="shard", mininterval=1, disable=not total))


def _finish(job: Job, uri: str, identity: dict[str, Any], counts: dict[str, float]) -> str:
    """Check the whole store, list what was rejected, log the run, and write store.json last."""
    files.remove_abandoned(uri)
    sidecars = [sidecar.read_sidecar(sidecar.sidecar_uri(uri, s.name), s.sha256) for s in job.manifest.shards]
    problems = [problem for s in sidecars for problem in _problems(s)]
    rows = sum(s.header.rows for s in sidecars)
    expected = job.manifest.samples if job.modality == "image" else job.manifest.captions
    if rows != expected:
        raise ValueError(
            f"{uri}: {rows} rows for {expected} in the manifest of {job.split_uri}; the manifest is out of date: run `itm pack`"
        )
    quarantine = files.join(uri, "quarantine.jsonl")
    if problems or files.exists(quarantine):
        files.write_atomic(quarantine, "".join(p.row() + "\n" for p in problems).encode())
    seen = rows + sum(len(s.header.unreadable) for s in sidecars)
    whole = sum(int(s.ok.sum()) for s in sidecars)
    assert seen == whole + len(problems), (seen, whole, len(problems))
    if len(problems) > job.recipe.data.max_reject_rate * seen:
        raise ValueError(
            f"{len(problems)} of {seen} rows could not be scored, more than data.max_reject_rate={job.recipe.data.max_reject_rate}; "
            f"the first: {problems[0].reason}; all are in {quarantine}"
        )
    headers = {s.header.shard: s.header for s in sidecars}
    if counts["shards_scored"] or not files.exists(files.join(uri, "store.json")):
        flow = {"rows_in": seen, "rows_out": whole, "rows_rejected": len(problems)}
        _track(job, uri, identity, counts | flow | {"rows": rows, "rejected": len(problems), "shards": len(sidecars)})
    return sidecar.write_store(job.root, job.choice, headers, identity)


def _problems(rows: sidecar.Sidecar) -> Iterator[Problem]:
    captions = rows.captions or [""] * len(rows.keys)
    for key, caption, reason in zip(rows.keys, captions, rows.problems, strict=True):
        if reason is not None:
            yield Problem(key, rows.header.shard, "teach", f"caption {caption}: {reason}" if caption else reason)
    for key, reason in rows.header.unreadable:
        yield Problem(key, rows.header.shard, "read", reason)


def _track(job: Job, uri: str, identity: dict[str, Any], counts: dict[str, float]) -> None:
    """One run per store, opened when its vectors are safe: a tracking server that is down costs no scoring."""
    from itm.tracking.lineage import DatasetRef
    from itm.tracking.registry import Tracker

    params = {f"teacher.{name}": value for name, value in identity.items()} | {"split": job.split, "modality": job.modality, "store": uri}
    data = [DatasetRef(job.split, job.manifest.fingerprint(), job.split_uri, "teaching")]
    name, tags = f"teach {job.split} {sidecar.teacher_id(identity)}", {"stage": "teach", "teacher_id": sidecar.teacher_id(identity)}
    with Tracker.start(job.recipe.registry.experiment, name, params, tags, data) as tracker:
        if counts["rows_scored"]:
            counts["rows_per_second"] = counts["rows_scored"] / counts["seconds"]
        tracker.metrics(counts)


def _permute(job: Job, uri: str, todo: list[ShardInfo], identity: dict[str, Any], *, base: sidecar.Store, seed: int) -> Iterator[Written]:
    """Write the sidecars of a shuffled store from those of its base store."""
    shards = {shard.name: shard for shard in todo}
    for name, rows in shuffled_rows(base, job.manifest, seed, shards) if todo else ():
        target = sidecar.sidecar_uri(uri, name)
        done = sidecar.write_sidecar(target, job.header(shards[name], identity), rows.keys, rows.vectors, rows.captions, rows.problems)
        yield Written(done.rows)


# --- scoring: shards -> decode or clean (Ray tasks) -> teacher (actor pool), which writes the sidecar ----------------------------------


def _score(job: Job, uri: str, todo: list[ShardInfo], identity: dict[str, Any], *, prepare: Callable[[Any], bytes]) -> Iterator[Written]:
    """Score the shards in any order; yields each as its sidecar is written.

    A shard travels as ONE Arrow row with list columns, so that Ray can neither split nor merge it. Actors take at most half of the CPUs,
    a quarter each: if they held all of them they would wait for ever for the tasks that feed them.
    """
    if not todo:
        return
    import ray

    from pipelines.on_ray.session import connect, core

    connect()
    teachers = job.recipe.teachers
    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    actors = max(1, min(teachers.actors, len(todo), int(cpus / 2 / ACTOR_CPUS)))
    rows = [{"shard": files.join(job.split_uri, s.name), "header": json.dumps(asdict(job.header(s, identity)))} for s in todo]
    dataset = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(Prepare(job.modality, prepare), batch_size=None, batch_format="pyarrow", num_cpus=min(core(), cpus // 2 or 0.5))
        .map_batches(
            Score,
            fn_constructor_args=(job.part, job.modality, uri, teachers.batch_size),
            compute=ray.data.ActorPoolStrategy(size=actors),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=ACTOR_CPUS,
            num_gpus=min(1.0, gpus / actors) if gpus else None,
        )
    )
    for row in dataset.iter_rows():
        if (error := row.pop("error")) is not None:
            raise ValueError(error)
        yield Written(**row)


_STRINGS, _BINARIES = pa.list_(pa.string()), pa.large_list(pa.large_binary())
_PREPARED = pa.schema(
    {"error": pa.string(), "header": pa.string(), "keys": _STRINGS, "captions": _STRINGS, "problems": _STRINGS, "payloads": _BINARIES}
)
_WRITTEN = pa.schema({"rows": pa.int64(), "actor": pa.string(), "began": pa.float64(), "ended": pa.float64(), "error": pa.string()})


@dataclass(frozen=True)
class Prepare:
    """Shards -> what the teacher reads: one table row a shard, one list element a sample (or caption).

    What the user can mend travels as text in `error`: Ray loses the type of an exception on its way to the driver.
    """

    modality: Modality
    prepare: Callable[[Any], bytes]

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._shard(**row) for row in shards.to_pylist()], _PREPARED)

    def _shard(self, shard: str, header: str) -> dict[str, Any]:
        try:
            return self._rows(shard, header)
        except (OSError, ValueError) as error:
            return {"error": f"{shard}: {error}", "header": header}

    def _rows(self, shard: str, header: str) -> dict[str, Any]:
        keys, captions, problems, payloads, unreadable = [], [], [], [], []
        for sample in read_samples(shard, json.loads(header)["shard_sha256"]):
            if isinstance(sample, Problem):
                unreadable += [[sample.key, sample.reason]] if sample.what != "caption" else []
                continue
            for row in [sample] if self.modality == "image" else sample.captions:
                payload, problem = self._row(row)
                keys.append(sample.key)
                captions.append("" if isinstance(row, Sample) else row.id)
                payloads.append(payload)
                problems.append(problem)
        known = json.dumps(json.loads(header) | {"unreadable": unreadable})
        return {"header": known, "keys": keys, "captions": captions, "problems": problems, "payloads": payloads}

    def _row(self, row: Any) -> tuple[bytes, str | None]:
        try:
            return self.prepare(row), None
        except ValueError as error:
            return b"", str(error)


class Score:
    """The teacher actor: embeds a shard's rows and writes its sidecar before it answers."""

    def __init__(self, part: Part, modality: Modality, store: str, batch_size: int) -> None:
        self.teacher = build_teacher(part, modality).to(resolve_device())
        self.store, self.batch_size, self.name = store, batch_size, uuid.uuid4().hex

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._shard(shards.slice(k, 1)) for k in range(len(shards))], _WRITTEN)

    def _shard(self, shard: pa.Table) -> dict[str, Any]:
        if shard["error"][0].is_valid:
            return {"error": shard["error"][0].as_py()}
        began = time.time()
        try:
            return {"rows": self._write(shard), "actor": self.name, "began": began, "ended": time.time()}
        except (OSError, ValueError) as error:
            return {"error": str(error)}

    def _write(self, shard: pa.Table) -> int:
        header = replace(sidecar.Header(**json.loads(shard["header"][0].as_py())), device=self.teacher.device.type)
        if sidecar.teacher_id(stored_identity(self.teacher, header.dtype)) != sidecar.teacher_id(header.identity):
            raise ValueError(f"this node has other weights of {header.identity['model']!r} than the driver; give every node the same")
        keys, captions, problems = (shard[name][0].as_py() for name in ("keys", "captions", "problems"))
        payloads = shard["payloads"][0].values
        ok = np.array([p is None for p in problems], dtype=bool)
        vectors = np.zeros((len(keys), self.teacher.width), np.float32)
        chosen = [payloads[int(row)].as_py() for row in np.flatnonzero(ok)]
        if chosen:
            vectors[ok] = embed_in_batches(self.teacher, chosen, self.batch_size)
        target = sidecar.sidecar_uri(self.store, header.shard)
        return sidecar.write_sidecar(target, header, keys, vectors, captions, problems).rows


if __name__ == "__main__":
    import sys

    from pipelines.cli import stage_main

    sys.exit(stage_main("teach"))
