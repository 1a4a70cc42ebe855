"""Equal captions of a whole split, embedded once: each row is scored in the first shard that has its text, and copied to the others.

Which row that is follows from the order of the manifest alone, and so does what a shard's batches hold: a store has the same bytes however
often its making was stopped, and those of old shards stay when new ones come. What is scored lies in `<store>/parts` until all of it is
there. The driver holds 8 bytes and a place for each different caption, and all shards are read once more, for their captions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from itm.data import files, sidecar
from itm.data.formats import Json
from itm.data.manifest import ShardInfo
from itm.data.records import Caption
from itm.data.shards import Sample, read_samples
from pipelines.teaching.actors import Written

COUNTS = "equal_captions.json"
PARTS = "parts"
_DIGESTS = pa.schema({"shard": pa.string(), "digests": pa.list_(pa.uint64()), "error": pa.string()})
Place = tuple[str, int]
"""(shard name, row in its sidecar)."""
Score = Callable[[str, list[ShardInfo], Mapping[str, list[int]]], Iterator[Written]]
"""(folder, shards, rows of each that are left without a vector) -> the shards' sidecars, written there."""


@dataclass(frozen=True)
class Digests:
    """Shards -> a number for each caption's text as the teacher reads it; 0 for a caption that it cannot read."""

    prepare: Callable[[Sample | Caption], bytes]

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._shard(**row) for row in shards.to_pylist()], _DIGESTS)

    def _shard(self, uri: str, name: str, sha256: str) -> Json:
        try:
            captions = [c for sample in read_samples(uri, sha256) if isinstance(sample, Sample) for c in sample.captions]
        except (OSError, ValueError) as error:
            return {"error": f"{uri}: {error}"}
        return {"shard": name, "digests": [self._digest(caption) for caption in captions]}

    def _digest(self, caption: Caption) -> int:
        try:
            return int.from_bytes(hashlib.blake2b(self.prepare(caption), digest_size=8).digest(), "little") or 1
        except ValueError:
            return 0


def digests_of(split_uri: str, shards: list[ShardInfo], prepare: Callable[[Sample | Caption], bytes]) -> Iterator[Json]:
    """`Digests` of the shards, in any order."""
    import ray

    from pipelines.on_ray.session import connect, core

    connect()
    rows = [{"uri": files.join(split_uri, s.name), "name": s.name, "sha256": s.sha256} for s in shards]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    yield from dataset.map_batches(Digests(prepare), batch_size=None, batch_format="pyarrow", num_cpus=core()).iter_rows()


def borrowed(shards: list[ShardInfo], digests: Mapping[str, list[int]]) -> dict[str, dict[int, Place]]:
    """Shard -> its rows whose text an earlier row has, of this shard or one before it, and the place of the first such row."""
    first: dict[int, Place] = {}
    found: dict[str, dict[int, Place]] = {}
    for shard in shards:
        found[shard.name] = {}
        for row, digest in enumerate(digests[shard.name]):
            place = first.setdefault(digest, (shard.name, row)) if digest else (shard.name, row)
            if place != (shard.name, row):
                found[shard.name][row] = place
    return found


@dataclass(frozen=True)
class Split:
    """What is taught: the folder of the shards, all of them in order, and how the teacher reads a caption."""

    uri: str
    shards: list[ShardInfo]
    prepare: Callable[[Sample | Caption], bytes]


def score_once(split: Split, uri: str, todo: list[ShardInfo], identity: Json, score: Score) -> Iterator[Written]:
    """Write the sidecars of the shards `todo` into the store at `uri`, with equal captions of the split embedded once.

    Raises ValueError for a shard that cannot be read.
    """
    if not todo:
        return
    digests = {}
    for said in digests_of(split.uri, split.shards, split.prepare):
        if said["error"] is not None:
            raise ValueError(said["error"])
        digests[said["shard"]] = list(said["digests"])
    lent = borrowed(split.shards, digests)
    parts = _parts(uri, lent)
    missing = [shard for shard in todo if not _is_there(parts, shard, identity)]
    yield from score(parts, missing, {shard.name: list(lent[shard.name]) for shard in missing})
    scored = {shard.name for shard in todo}
    for shard in todo:
        _assemble(uri, parts, shard.name, lent[shard.name], scored)
    texts = len({digest for rows in digests.values() for digest in rows if digest})
    counts = {"captions": sum(map(len, digests.values())), "texts": texts}
    files.write_atomic(files.join(uri, COUNTS), (json.dumps(counts) + "\n").encode())
    filesystem, path = files.resolve(files.join(uri, PARTS))
    filesystem.delete_dir(path)


def _parts(uri: str, lent: Mapping[str, dict[int, Place]]) -> str:
    """Of another division of the rows it is another folder."""
    division = json.dumps([[name, list(rows)] for name, rows in lent.items()])
    return files.join(uri, PARTS, hashlib.sha256(division.encode()).hexdigest()[:10])


def _is_there(parts: str, shard: ShardInfo, identity: Json) -> bool:
    header = sidecar.read_header(sidecar.sidecar_uri(parts, shard.name))
    return header is not None and header.shard_sha256 == shard.sha256 and header.identity == identity


def _assemble(uri: str, parts: str, name: str, lent: Mapping[int, Place], scored: set[str]) -> None:
    """The sidecar of a shard: its own rows, and those that others lend, number for number."""
    part = sidecar.read_sidecar(sidecar.sidecar_uri(parts, name))
    columns = {column: part.table[column].combine_chunks() for column in part.table.column_names}
    arrays = {"vector": _codes(part).copy()} | ({"scale": _scale(part).copy()} if "scale" in columns else {})
    problems = list(part.problems)
    for owner in sorted({shard for shard, _ in lent.values()}):
        there = sidecar.read_sidecar(sidecar.sidecar_uri(parts if owner in scored else uri, owner))
        mine = [row for row, (shard, _) in lent.items() if shard == owner]
        theirs = [lent[row][1] for row in mine]
        arrays["vector"][mine] = _codes(there)[theirs]
        if "scale" in arrays:
            arrays["scale"][mine] = _scale(there)[theirs]
        for row in mine:
            problems[row] = None
    columns["problem"] = pa.array(problems, pa.string())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(arrays["vector"].reshape(-1)), part.header.width)
    if "scale" in arrays:
        columns["scale"] = pa.array(arrays["scale"], pa.float16())
    header = replace(part.header, rejected=sum(problem is not None for problem in problems))
    table = pa.table(columns).replace_schema_metadata({"itm": header.to_json()})
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    files.write_atomic(sidecar.sidecar_uri(uri, name), sink.getvalue().to_pybytes())


def _codes(rows: sidecar.Sidecar) -> np.ndarray:
    """(N, D) as they are stored."""
    return rows.table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=True).reshape(-1, rows.header.width)


def _scale(rows: sidecar.Sidecar) -> np.ndarray:
    return rows.table["scale"].combine_chunks().to_numpy(zero_copy_only=False)


def counts_of(uri: str) -> str:
    """Words about how many texts were embedded for the captions of a store; none where equal ones were not looked for."""
    said = files.join(uri, COUNTS)
    if not files.exists(said):
        return ""
    counts = json.loads(files.read_bytes(said))
    return f"; {counts['texts']:,} different texts of {counts['captions']:,} captions were embedded"
