"""The driver of `itm teach`: it finds out what is missing, has it scored, and closes the store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from itm.config import Part, Recipe
from itm.data import files, sidecar
from itm.data.formats import Json
from itm.data.lease import held
from itm.data.manifest import check_present
from itm.data.records import Caption, Problem, check_rows
from itm.data.shards import Manifest, Sample, ShardInfo, read_manifest
from itm.progress import over
from itm.teachers.identity import Modality, build_teacher, choice_of
from itm.teachers.shuffled import SHUFFLED, shuffle_of, shuffled_identity, shuffled_rows
from itm.teachers.stores import roots_of, stored_identity, stores_root
from pipelines.on_ray.reach import shared
from pipelines.on_ray.shard_actors import through_actors
from pipelines.teaching import equal_captions
from pipelines.teaching.actors import Prepare, Score, Written

if TYPE_CHECKING:
    from itm.tracking.runs import Tracker

MODALITIES: tuple[Modality, ...] = ("image", "text")


def teach(recipe: Recipe, split: str | None = None) -> dict[str, str]:
    """Make (or complete) the stores that a recipe asks for; returns modality -> store URI.

    Raises ValueError when no teacher is named, nothing can be written, a teacher gives unusable vectors, or too many rows are rejected.
    """
    split = split or recipe.data.train_split
    parts = recipe.teachers.stored
    if not parts and recipe.teachers.online:
        raise ValueError(f"recipe {recipe.name!r} has no teacher to store: teachers.online has them run while it trains")
    if not parts:
        raise ValueError(f"recipe {recipe.name!r} names no teacher: set teachers.image and/or teachers.text")
    if not recipe.data.mix:
        return {modality: _make_store(Job.of(recipe, split, modality, part)) for modality, part in parts.items()}
    made = {(one.data.root, modality): Job.of(one, split, modality, part) for one in roots_of(recipe) for modality, part in parts.items()}
    return {f"{modality} of {root}": _make_store(job) for (root, modality), job in made.items()}


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
        folder = files.absolute(files.join(recipe.data.root, split))
        root = stores_root(recipe, split)
        files.check_writable(root)
        manifest = read_manifest(folder)
        check_present(folder, manifest)
        return cls(recipe, split, modality, part, folder, root, manifest)

    @property
    def choice(self) -> Json:
        return choice_of(self.part, self.modality, self.recipe.teachers.dtype)

    def header(self, shard: ShardInfo, identity: Json) -> sidecar.Header:
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
        if job.modality == "text" and job.recipe.teachers.equal_captions == "split":
            work = partial(_score_once, prepare=teacher.prepare)
        del teacher  # its weights would lie beside those of the actors
    uri = files.join(job.root, sidecar.teacher_id(identity))
    with held(uri, "teach"):
        return _completed(job, uri, identity, work)


def _completed(job: Job, uri: str, identity: Json, work: Callable[..., Iterator[Written]]) -> str:
    """The store at `uri`, with the shards that had no valid sidecar yet."""
    with ThreadPoolExecutor(8) as pool:  # headers are small reads, one a shard
        done = list(pool.map(lambda shard: _is_done(uri, shard, identity), job.manifest.shards))
    todo = [s for s, is_done in zip(job.manifest.shards, done, strict=True) if not is_done]
    started = time.perf_counter()
    fresh = todo or not files.exists(files.join(uri, "store.json"))
    with _tracked(job, uri, identity) if fresh else nullcontext() as tracker:
        written = list(over(work(job, uri, todo, identity), f"teach {job.split} {job.modality}", len(todo), "shard"))
        counts = {"shards_scored": len(todo), "rows_scored": sum(w.rows for w in written), "seconds": time.perf_counter() - started}
        return _finish(job, uri, identity, counts | busy(written), tracker)


def _is_done(store: str, shard: ShardInfo, identity: Json) -> bool:
    header = sidecar.read_header(sidecar.sidecar_uri(store, shard.name))
    if header is None or header.shard_sha256 != shard.sha256 or header.format != sidecar.format_of(identity):
        return False
    return sidecar.teacher_id(header.identity) == sidecar.teacher_id(identity)


def busy(written: Sequence[Written]) -> dict[str, float]:
    """`actor_busy`: share of their time, from an actor's first shard to the last of all, that the actors did not wait for decoded rows."""
    actors = {w.actor for w in written if w.actor}
    if not actors:
        return {}
    end = max(w.ended for w in written)
    alive = sum(end - min(w.began for w in written if w.actor == actor) for actor in actors)
    return {"actor_busy": sum(w.ended - w.began for w in written) / alive}


def _finish(job: Job, uri: str, identity: Json, counts: dict[str, float], tracker: Tracker | None) -> str:
    """Check the whole store, list what was rejected, log to the run, if there is one, and write store.json last."""
    files.remove_abandoned(uri)
    sidecars = [sidecar.read_sidecar(sidecar.sidecar_uri(uri, s.name), s.sha256) for s in job.manifest.shards]
    problems = [problem for s in sidecars for problem in _problems(s)]
    views = sidecar.views_of(identity)
    rows = sum(s.header.rows for s in sidecars) // views
    expected = job.manifest.samples if job.modality == "image" else job.manifest.captions
    if rows != expected:
        raise ValueError(
            f"{uri}: {rows} rows for {expected} in the manifest of {job.split_uri}; the manifest is out of date: run `itm pack`"
        )
    quarantine = files.join(uri, "quarantine.jsonl")
    if problems or files.exists(quarantine):
        files.write_atomic(quarantine, "".join(p.row() + "\n" for p in problems).encode())
    seen = rows + sum(len(s.header.unreadable) for s in sidecars)
    whole = sum(int(s.ok.sum()) for s in sidecars) // views
    for shard, s in zip(job.manifest.shards, sidecars, strict=True):
        sent = len(s.header.unreadable) + (shard.samples if job.modality == "image" else shard.captions)
        check_rows(s.uri, sent, int(s.ok.sum()) // views, len(list(_problems(s))))
    if len(problems) > job.recipe.data.max_reject_rate * seen:
        raise ValueError(
            f"{len(problems)} of {seen} rows could not be scored, more than data.max_reject_rate={job.recipe.data.max_reject_rate}; "
            f"the first: {problems[0].reason}; all are in {quarantine}"
        )
    _check_not_constant(uri, identity, sidecars)
    headers = {s.header.shard: s.header for s in sidecars}
    if tracker:
        flow = {"rows_in": seen, "rows_out": whole, "rows_rejected": len(problems)}
        speed = {"rows_per_second": counts["rows_scored"] / counts["seconds"]} if counts["rows_scored"] else {}
        tracker.metrics(counts | speed | flow | {"rows": rows, "rejected": len(problems), "shards": len(sidecars)})
        tracker.flush()
        if problems:
            with files.local_copy(quarantine) as kept:
                tracker.artifact(kept)
    return sidecar.write_store(job.root, job.choice, headers, identity)


def _check_not_constant(uri: str, identity: Json, sidecars: Sequence[sidecar.Sidecar]) -> None:
    """Raises ValueError when all rows have one vector. Almost always the first shard shows that they differ."""
    first, count = None, 0
    for rows in (s.vectors[s.ok] for s in sidecars):
        first = rows[0] if first is None and len(rows) else first
        if first is not None and (rows != first).any():
            return
        count += len(rows)
    if count > 1:
        raise ValueError(
            f"{uri}: the teacher {identity['kind']!r} gave one and the same vector for all {count:,} rows, so its soft labels say nothing: "
            "mend the teacher, or look whether all of its inputs are equal"
        )


def flow_line(uri: str) -> str:
    """Rows of a finished store: samples of an image store, captions of a text store; rejected ones too."""
    store = sidecar.open_store(uri)
    rows, rejected = (sum(shard[name] for shard in store.shards.values()) // store.views for name in ("rows", "rejected"))
    quarantine = files.join(uri, "quarantine.jsonl")
    listed = files.read_bytes(quarantine).count(b"\n") if files.exists(quarantine) else 0
    unread = listed - rejected  # by the reader of the shards, which leaves no row
    what = "images" if store.modality == "image" else "captions"
    shared = equal_captions.counts_of(uri)
    unknown = f", {unread:,} of them samples that could not be read" if unread and store.modality == "text" else ""
    views = f", {store.views} views each" if store.views > 1 else ""
    return f"{rows + unread:,} {what}{views} = {rows - rejected:,} with a vector + {listed:,} rejected{unknown}{shared}"


def _problems(rows: sidecar.Sidecar) -> Iterator[Problem]:
    captions = rows.captions or [""] * len(rows.keys)
    each = slice(None, None, rows.header.views)  # the views of a sample have one problem
    for key, caption, reason in zip(rows.keys[each], captions[each], rows.problems[each], strict=True):
        if reason is not None:
            yield Problem(key, rows.header.shard, "teach", f"caption {caption}: {reason}" if caption else reason)
    for key, reason in rows.header.unreadable:
        yield Problem(key, rows.header.shard, "read", reason)


def _tracked(job: Job, uri: str, identity: Json) -> Tracker:
    """One run per store, for the time of the work."""
    from itm.tracking.lineage import DatasetRef, packages_used
    from itm.tracking.runs import Tracker

    params = {f"teacher.{name}": value for name, value in identity.items()} | {"split": job.split, "modality": job.modality, "store": uri}
    data = [DatasetRef(job.split, job.manifest.fingerprint(), job.split_uri, "teaching")]
    name, tags = f"teach {job.split} {sidecar.teacher_id(identity)}", {"stage": "teach", "teacher_id": sidecar.teacher_id(identity)}
    tags |= packages_used(job.part.model_dump(mode="json"))
    return Tracker.start(job.recipe.registry.experiment, name, params, tags, data)


def _permute(job: Job, uri: str, todo: list[ShardInfo], identity: Json, *, base: sidecar.Store, seed: int) -> Iterator[Written]:
    """Write the sidecars of a shuffled store from those of its base store."""
    shards = {shard.name: shard for shard in todo}
    for name, rows in shuffled_rows(base, job.manifest, seed, shards) if todo else ():
        target = sidecar.sidecar_uri(uri, name)
        done = sidecar.write_sidecar(target, job.header(shards[name], identity), rows.keys, rows.vectors, rows.captions, rows.problems)
        yield Written(done.rows)


def _score_once(job: Job, uri: str, todo: list[ShardInfo], identity: Json, *, prepare: Callable[..., bytes]) -> Iterator[Written]:
    """As `_score`, with equal captions of the split embedded once."""

    def score(parts: str, missing: list[ShardInfo], skip: Mapping[str, list[int]]) -> Iterator[Written]:
        return _score(job, parts, missing, identity, prepare=prepare, skip=skip)

    split = equal_captions.Split(job.split_uri, job.manifest.shards, prepare)
    return equal_captions.score_once(split, uri, todo, identity, score)


def _score(
    job: Job,
    uri: str,
    todo: list[ShardInfo],
    identity: Json,
    *,
    prepare: Callable[[Sample | Caption], bytes],
    skip: Mapping[str, list[int]] | None = None,
) -> Iterator[Written]:
    """Score the shards in any order; yields each as its sidecar is written. skip: rows of a shard that are left without a vector."""
    if not todo:
        return
    rows: list[Json] = [{"shard": files.join(job.split_uri, s.name), "header": json.dumps(asdict(job.header(s, identity)))} for s in todo]
    if skip is not None:
        rows = [row | {"skip": skip[shard.name]} for row, shard in zip(rows, todo, strict=True)]
    teachers = job.recipe.teachers
    with shared({"data.root": job.recipe.data.root, "teachers.root": job.root}) as tokens:

        def given(device: str) -> tuple[object, ...]:
            return job.part, job.modality, uri, teachers.batch_size, device, tokens

        for row in through_actors(rows, Prepare(job.modality, prepare, tokens), Score, given, teachers.actors):
            yield Written(**row)
