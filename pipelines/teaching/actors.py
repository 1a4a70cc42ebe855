"""The two operators of `itm teach`: shards -> decode or clean (Ray tasks) -> the teacher (actor pool), which writes the sidecar."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from itm.config import Part
from itm.data import sidecar
from itm.data.formats import Json
from itm.data.records import Caption, Problem
from itm.data.shards import Sample, read_samples
from itm.device import resolve_device
from itm.teachers.identity import Modality, build_teacher, embed_in_batches
from itm.teachers.stores import stored_identity
from pipelines.on_ray import meters
from pipelines.on_ray.reach import Tokens, confirm

MOST_DIFFERENT = 0.5  # share of different captions in a shard up to which equal ones are embedded once
_STRINGS, _BINARIES = pa.list_(pa.string()), pa.large_list(pa.large_binary())
LENT = "scored with an equal caption"  # of a row that another shard lends
_PREPARED = pa.schema(
    {"error": pa.string(), "header": pa.string(), "keys": _STRINGS, "captions": _STRINGS, "problems": _STRINGS, "payloads": _BINARIES}
)
_WRITTEN = pa.schema({"rows": pa.int64(), "actor": pa.string(), "began": pa.float64(), "ended": pa.float64(), "error": pa.string()})


@dataclass(frozen=True)
class Written:
    """A sidecar that was written: its rows, and when (seconds since 1970) which teacher actor had it in hand."""

    rows: int
    actor: str = ""
    began: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class Prepare:
    """Shards -> what the teacher reads: one table row a shard, one list element a sample (or caption).

    What the user can mend travels as text in `error`: Ray loses the type of an exception on its way to the driver.
    """

    modality: Modality
    prepare: Callable[[Sample | Caption], bytes]
    tokens: Tokens = ()  # of folders that every node must see

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._shard(**row) for row in shards.to_pylist()], _PREPARED)

    def _shard(self, shard: str, header: str, skip: list[int] | None = None) -> Json:
        """skip: rows that are not to be scored, because an equal one is."""
        try:
            confirm(self.tokens)
            return self._rows(shard, header, set(skip or ()))
        except (OSError, ValueError) as error:
            return {"error": f"{shard}: {error}", "header": header}

    def _rows(self, shard: str, header: str, skip: set[int]) -> Json:
        keys: list[str] = []
        captions, problems, payloads, unreadable = [], [], [], []
        for sample in read_samples(shard, json.loads(header)["shard_sha256"]):
            if isinstance(sample, Problem):
                unreadable += [[sample.key, sample.reason]] if sample.what in ("sample", "shard") else []
                continue
            for row in [sample] if self.modality == "image" else sample.captions:
                payload, problem = (b"", LENT) if len(keys) in skip else self._row(row)
                keys.append(sample.key)
                captions.append("" if isinstance(row, Sample) else row.id)
                payloads.append(payload)
                problems.append(problem)
        known = json.dumps(json.loads(header) | {"unreadable": unreadable})
        return {"header": known, "keys": keys, "captions": captions, "problems": problems, "payloads": payloads}

    def _row(self, row: Sample | Caption) -> tuple[bytes, str | None]:
        try:
            return self.prepare(row), None
        except ValueError as error:
            return b"", str(error)
        except MemoryError:
            return b"", "there is not enough memory to prepare it"


class Score:
    """The teacher actor: embeds a shard's rows and writes its sidecar before it answers."""

    def __init__(self, part: Part, modality: Modality, store: str, batch_size: int, device: str = "auto", tokens: Tokens = ()) -> None:
        self.tokens = tokens
        self.teacher = build_teacher(part, modality).to(resolve_device(device))
        self.store, self.batch_size, self.name = store, batch_size, uuid.uuid4().hex

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._shard(shards.slice(k, 1)) for k in range(len(shards))], _WRITTEN)

    def _shard(self, shard: pa.Table) -> Json:
        if shard["error"][0].is_valid:
            return {"error": shard["error"][0].as_py()}
        began = time.time()
        try:
            confirm(self.tokens)
            rows, ended = self._write(shard), time.time()
        except (OSError, ValueError) as error:
            return {"error": str(error)}
        for name, more in {"rows": rows, "shards": 1, "busy_seconds": ended - began}.items():
            meters.count(f"itm_teach_{name}", more, self.teacher.modality)
        return {"rows": rows, "actor": self.name, "began": began, "ended": ended}

    def _embed(self, payloads: list[bytes]) -> np.ndarray:
        """(N, D). Where most captions of the shard are repeats, of equal ones one is embedded.

        Elsewhere it would gain nothing (0.3 % of COCO's are) and change last digits, which depend on what else is in a batch. For the same
        reason not across shards: bytes would depend on which shard came first.
        """
        place: dict[bytes, int] = {}
        rows = [place.setdefault(payload, len(place)) for payload in payloads] if self.teacher.modality == "text" else []
        if not rows or len(place) > MOST_DIFFERENT * len(rows):
            return embed_in_batches(self.teacher, payloads, self.batch_size)
        return embed_in_batches(self.teacher, list(place), self.batch_size)[rows]

    def _write(self, shard: pa.Table) -> int:
        header = replace(sidecar.Header(**json.loads(shard["header"][0].as_py())), device=self.teacher.device.type)
        if sidecar.teacher_id(stored_identity(self.teacher, header.dtype)) != sidecar.teacher_id(header.identity):
            raise ValueError(f"this node has other weights of {header.identity['model']!r} than the driver; give every node the same")
        keys, captions, problems = (shard[name][0].as_py() for name in ("keys", "captions", "problems"))
        payloads = shard["payloads"][0].values
        ok = np.array([p is None for p in problems], dtype=bool)
        chosen = [payloads[int(row)].as_py() for row in np.flatnonzero(ok)]
        views = self.teacher.views
        if views > 1:
            keys, problems, ok = [key for key in keys for _ in range(views)], [p for p in problems for _ in range(views)], ok.repeat(views)
        vectors = np.zeros((len(keys), self.teacher.width), np.float32)
        if chosen:
            vectors[ok] = self._embed(chosen)
        target = sidecar.sidecar_uri(self.store, header.shard)
        return sidecar.write_sidecar(target, header, keys, vectors, captions, problems).rows
