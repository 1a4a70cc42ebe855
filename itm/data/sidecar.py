"""The soft-label store: teacher vectors beside the shards, one Arrow IPC file per shard and teacher.

    <teachers root>/<teacher id>/<shard stem>.arrow     columns key, [caption], problem, vector, [scale]; rows in tar order
    <teachers root>/<teacher id>/store.json             written last: its presence says that the store is whole
    <teachers root>/<choice id>.json                    which store serves a recipe's choice of teacher

An image store has one row per sample, or one per view of it (column view, format 2), a text store one row per caption. Vectors are stored
at unit length (only their cosines are ever used) as fp16, fp32, or int8 codes with one fp16 scale a row. A row whose teacher input could
not be read keeps its place, with a reason in `problem` and a zero vector. Nothing but numpy and pyarrow is needed to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs, ipc

from itm.data import files
from itm.data.formats import Json, NewerFormat, check_format

FORMAT = 2  # 1: one vector a sample or caption; 2: several views of a sample, in rows of their own
REMEDY = "run `itm teach` with this recipe (finished shards are kept)"
_NOT_UNIT = 0.05  # int8 of the widest vectors is off by less
_ARROW = {"fp16": pa.float16(), "fp32": pa.float32(), "int8": pa.int8()}
_NUMPY: dict[str, type[np.generic]] = {"fp16": np.float16, "fp32": np.float32, "int8": np.int8}


@dataclass(frozen=True)
class Header:
    """What a sidecar says about itself, kept as JSON in the Arrow schema metadata.

    `unreadable` lists the (key, reason) of samples that the shard reader already rejected: they have no row. `device`: the kind of device
    that computed the vectors, whose last digits another kind does not repeat; it is written where it is not the CPU.
    """

    identity: Json
    modality: str
    dtype: str
    shard: str
    shard_sha256: str
    unreadable: list[list[str]] = field(default_factory=list)
    rows: int = 0
    rejected: int = 0
    width: int = 0
    format: int = 1
    device: str = "cpu"

    @property
    def views(self) -> int:
        """Neighbouring rows that each sample has."""
        return views_of(self.identity)

    def to_json(self) -> str:
        said = asdict(self)
        if self.device == "cpu":
            del said["device"]
        return json.dumps(said, sort_keys=True)


@dataclass(frozen=True)
class Sidecar:
    """The rows of one shard, as they lie in the file (memory-mapped when it is local)."""

    uri: str
    header: Header
    table: pa.Table

    @cached_property
    def keys(self) -> list[str]:
        """Sample key of each row."""
        return self.table["key"].to_pylist()

    @cached_property
    def captions(self) -> list[str] | None:
        """Caption id of each row; None in an image store."""
        return self.table["caption"].to_pylist() if self.header.modality == "text" else None

    @cached_property
    def problems(self) -> list[str | None]:
        """Why a row has no vector, or None."""
        return self.table["problem"].to_pylist()

    @cached_property
    def ok(self) -> np.ndarray:
        """(N,) bool, True where the row has a vector."""
        return np.array([p is None for p in self.problems], dtype=bool)

    @cached_property
    def vectors(self) -> np.ndarray:
        """(N, D) at unit length: fp16 or fp32 as stored (no copy), float32 when stored as int8."""
        codes = _matrix(self.table["vector"], self.header)
        if self.header.dtype != "int8":
            return codes
        scale = self.table["scale"].combine_chunks().to_numpy(zero_copy_only=False)
        return codes.astype(np.float32) * scale.astype(np.float32)[:, None]


def write_sidecar(
    uri: str,
    header: Header,
    keys: Sequence[str],
    vectors: np.ndarray,
    captions: Sequence[str] | None = None,
    problems: Sequence[str | None] | None = None,
) -> Header:
    """Check the rows, store them atomically and return the completed header. Equal input gives equal bytes.

    vectors (N, D) float32; captions: caption ids of a text store; problems: a reason for each row without a vector.
    Raises ValueError for a wrong rank or length, a non-finite value or a zero norm where there is no problem.
    """
    problems = list(problems or [None] * len(keys))
    ok = np.array([p is None for p in problems], dtype=bool)
    vectors = np.asarray(vectors, dtype=np.float32)
    _check(uri, keys, vectors, ok, "mend the teacher")
    unit = np.zeros_like(vectors)
    unit[ok] = vectors[ok] / np.linalg.norm(vectors[ok], axis=1, keepdims=True)
    columns: dict[str, pa.Array] = {"key": pa.array(keys, pa.string())}
    if header.modality == "text":
        columns["caption"] = pa.array(captions, pa.string())
    if header.views > 1:
        columns["view"] = pa.array(np.arange(len(keys)) % header.views, pa.int16())
    columns["problem"] = pa.array(problems, pa.string())
    codes, scale = _encode(unit, header.dtype)
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1), _ARROW[header.dtype]), vectors.shape[1])
    if scale is not None:
        columns["scale"] = pa.array(scale, pa.float16())
    known = {"rows": len(keys), "rejected": int((~ok).sum()), "width": vectors.shape[1], "format": format_of(header.identity)}
    done = Header(**asdict(header) | known)
    table = pa.table(columns).replace_schema_metadata({"itm": done.to_json()})
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    files.write_atomic(uri, sink.getvalue().to_pybytes())
    return done


def read_sidecar(uri: str, shard_sha256: str | None = None, teacher: str | None = None) -> Sidecar:
    """Open a sidecar, memory-mapped when local, and check it: format, shard, teacher, rank, finiteness and norms.

    Raises ValueError naming the file, the row and the remedy.
    """
    sidecar = _open(uri)
    header = sidecar.header
    if shard_sha256 is not None and header.shard_sha256 != shard_sha256:
        was, now = header.shard_sha256[:12], shard_sha256[:12]
        raise ValueError(f"{uri} was scored from another shard: {header.shard} of sha256 {was}, expected {now}: {REMEDY}")
    if teacher is not None and teacher_id(header.identity) != teacher:
        raise ValueError(f"{uri} was scored by {teacher_id(header.identity)}, expected {teacher}: {REMEDY}")
    if len(sidecar.table) != header.rows:
        raise ValueError(f"{uri} holds {len(sidecar.table)} rows, its header says {header.rows}: delete it and {REMEDY}")
    squares = _check(uri, sidecar.keys, sidecar.vectors, sidecar.ok, f"delete the file and {REMEDY}")
    off = ~(np.abs(squares - sidecar.ok) < _NOT_UNIT)  # rows without a vector hold zeros
    if off.any():
        row = int(np.flatnonzero(off)[0])
        raise ValueError(
            f"{uri}: row {row}, sample {sidecar.keys[row]!r}: the stored vector has the squared length {squares[row]:.3g}, "
            f"expected {int(sidecar.ok[row])} ({int(off.sum())} such rows): delete the file and {REMEDY}"
        )
    return sidecar


def read_header(uri: str) -> Header | None:
    """The header alone, or None if there is no whole sidecar at `uri`. Raises NewerFormat."""
    try:
        return _open(uri).header
    except NewerFormat:
        raise
    except ValueError:
        return None


def _open(uri: str) -> Sidecar:
    filesystem, path = files.resolve(uri)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        raise ValueError(f"no sidecar at {uri}: {REMEDY}")
    local = isinstance(filesystem, fs.LocalFileSystem)
    source = pa.memory_map(path) if local else pa.BufferReader(files.read_bytes(uri))
    try:
        table = ipc.open_file(source).read_all()
        said = json.loads(table.schema.metadata[b"itm"])
        check_format(uri, said, FORMAT)
        header = Header(**said)
        _check_layout(header, table)
    except NewerFormat:
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{uri} is not a sidecar of format {FORMAT} ({error}): delete it and {REMEDY}") from None
    return Sidecar(uri, header, table)


def _check_layout(header: Header, table: pa.Table) -> None:
    """Raises ValueError for a header or columns that no writer of this format makes: Arrow would follow false offsets out of the file."""
    kinds = {"identity": dict, "unreadable": list, "rows": int, "width": int, "rejected": int, "shard": str, "shard_sha256": str}
    for name, kind in kinds.items():
        if not isinstance(getattr(header, name), kind):
            raise ValueError(f"{name} of the header is no {kind.__name__}")
    if header.modality not in ("image", "text") or header.dtype not in _ARROW or "kind" not in header.identity or header.width < 0:
        raise ValueError("the header names no known modality, dtype, teacher or width")
    if not table.schema.equals(_schema(header)):
        raise ValueError(f"columns {table.schema.names} of other types or another width than its header says")
    table.validate(full=True)
    views = header.views
    if views > 1 and (len(table) % views or not np.array_equal(table["view"].to_numpy(), np.arange(len(table)) % views)):
        raise ValueError(f"its rows are not {views} views a sample")
    for name in table.column_names:
        if name != "problem" and (table[name].null_count or (name == "vector" and any(c.values.null_count for c in table[name].chunks))):
            raise ValueError(f"column {name} has empty cells")


def _schema(header: Header) -> pa.Schema:
    """The columns of a sidecar with this header."""
    text = {"caption": pa.string()} if header.modality == "text" else {}
    scale = {"scale": pa.float16()} if header.dtype == "int8" else {}
    view = {"view": pa.int16()} if header.views > 1 else {}
    vector = {"vector": pa.list_(_ARROW[header.dtype], header.width)}
    return pa.schema({"key": pa.string(), **text, **view, "problem": pa.string(), **vector, **scale})


def _check(uri: str, keys: Sequence[str], vectors: np.ndarray, ok: np.ndarray, remedy: str) -> np.ndarray:
    """The squared length of each row (N,)."""
    if vectors.ndim != 2 or len(vectors) != len(keys) or (len(keys) and vectors.shape[1] < 2):
        raise ValueError(f"{uri}: teacher vectors of shape {vectors.shape} for {len(keys)} rows; expected (rows, width > 1): {remedy}")
    # One pass: a NaN or an infinity anywhere in a row makes its sum of squares non-finite.
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float32)
    for wrong, what in ((~np.isfinite(squares), "is not finite"), (squares == 0, "has zero norm")):
        rows = np.flatnonzero(wrong & ok)
        if len(rows):
            raise ValueError(f"{uri}: row {rows[0]}, sample {keys[rows[0]]!r}: the teacher vector {what} ({len(rows)} such rows): {remedy}")
    return np.asarray(squares)


def _encode(unit: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Unit rows as stored. int8: code = round(v / scale), scale = max |v| of the row / 127 as fp16."""
    if dtype != "int8":
        return unit.astype(_NUMPY[dtype]), None
    scale = (np.abs(unit).max(axis=1, initial=0) / 127).astype(np.float16)
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.clip(np.rint(unit / divisor[:, None]), -127, 127).astype(np.int8), scale


def _matrix(column: pa.ChunkedArray, header: Header) -> np.ndarray:
    if not len(column):
        return np.zeros((0, header.width), _NUMPY[header.dtype])
    values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return values.flatten().to_numpy(zero_copy_only=True).reshape(-1, header.width)


# --- stores -------------------------------------------------------------------------------------------------------------------


def teacher_id(identity: Mapping[str, object]) -> str:
    """A readable name and 10 hex digits of the whole identity: `minilm-all-MiniLM-L6-v2-0a1b2c3d4e`."""
    model = re.sub(r"[^A-Za-z0-9._]+", "-", str(identity.get("model", "")).rstrip("/").split("/")[-1]).strip("-.")[:40]
    return "-".join(filter(None, (str(identity["kind"]).replace("_", "-"), model, _digest(identity))))


def views_of(identity: Mapping[str, Any]) -> int:
    """Vectors that a teacher, or the one that a control was made from, gives to each sample."""
    of = identity.get("of")
    return int(identity.get("views", views_of(of) if isinstance(of, Mapping) else 1))


def format_of(identity: Mapping[str, Any]) -> int:
    return 2 if views_of(identity) > 1 else 1


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Store:
    """A whole store: the teacher, and what is known of each shard's sidecar (`{shard name: {sha256, rows, rejected}}`)."""

    uri: str
    modality: str
    dtype: str
    width: int
    identity: Json
    shards: dict[str, Json]
    crops: int | None = None  # of several views the next at each epoch is read, whose crop this seed draws; unset = their mean

    @property
    def teacher(self) -> str:
        return teacher_id(self.identity)

    @property
    def views(self) -> int:
        return views_of(self.identity)

    def sidecar(self, shard: str, sha256: str | None = None) -> Sidecar:
        """The checked sidecar of a shard (its file name). Raises ValueError when it is missing or of other bytes."""
        return read_sidecar(sidecar_uri(self.uri, shard), sha256, self.teacher)

    def check(self, shards: Iterable[tuple[str, str]]) -> None:
        """Refuse before work starts: every (shard name, sha256) must have been scored. Raises ValueError naming the first."""
        there = files.sizes(self.uri, ".arrow")
        for name, sha256 in shards:
            known = self.shards.get(name)
            if known is None or files.name_of(sidecar_uri(self.uri, name)) not in there:
                raise ValueError(f"no sidecar at {sidecar_uri(self.uri, name)}: {REMEDY}")
            if known["sha256"] != sha256:
                raise ValueError(f"{sidecar_uri(self.uri, name)} was scored from another version of {name}: {REMEDY}")


def sidecar_uri(store: str, shard: str) -> str:
    return files.join(store, f"{shard.rsplit('/', 1)[-1].removesuffix('.tar')}.arrow")


def write_store(root: str, choice: Mapping[str, object], headers: Mapping[str, Header], identity: Json) -> str:
    """Write store.json (and the pointer that leads from a recipe's choice to it) and return the store's URI.

    headers: by shard name, in shard order. choice: modality, dtype, kind, options, as a recipe spells its teacher.
    """
    uri = files.join(root, teacher_id(identity))
    shards = {n: {"sha256": h.shard_sha256, "rows": h.rows, "rejected": h.rejected} for n, h in headers.items()}
    width = max((h.width for h in headers.values()), default=0)
    receipt = {"format": format_of(identity), "modality": choice["modality"], "dtype": choice["dtype"], "width": width}
    _write_json(files.join(uri, "store.json"), receipt | {"identity": identity, "shards": shards})
    _write_json(_pointer(root, choice), {"teacher": teacher_id(identity), "choice": dict(choice)})
    return uri


def open_store(root: str, teacher: str | None = None) -> Store:
    """The store of a teacher id below `root` (or the store at `root` itself). Raises ValueError naming an absent or unfinished one."""
    uri = files.join(root, teacher) if teacher else root
    receipt = files.join(uri, "store.json")
    if not files.exists(receipt):
        raise ValueError(f"no finished soft-label store at {uri} (store.json is missing): {REMEDY}")
    said = _read_json(receipt, {"modality": str, "dtype": str, "width": int, "identity": dict, "shards": dict})
    if teacher and (holds := teacher_id(said["identity"])) != teacher:
        raise ValueError(f"{uri} bears the name of another teacher: it was scored by {holds}. Give the folder its name back, or {REMEDY}")
    return Store(uri, said["modality"], said["dtype"], said["width"], said["identity"], said["shards"])


def find_store(root: str, choice: Mapping[str, object]) -> Store:
    """The store that `itm teach` last finished for a recipe's choice of teacher; no teacher is loaded.

    Raises ValueError naming the teacher and the remedy when there is none.
    """
    pointer = _pointer(root, choice)
    if not files.exists(pointer):
        raise ValueError(
            f"no soft-label store of the {choice['modality']} teacher {choice['kind']!r} below {root}{_other(root, choice)}: {REMEDY}"
        )
    return open_store(root, _read_json(pointer, {"teacher": str})["teacher"])


def _other(root: str, choice: Mapping[str, object]) -> str:
    """Words about a store of the same teacher in another precision, of its model or of its vectors; none where there is none."""

    def parts(choice: Json) -> tuple[dict[str, str], Json]:
        options = dict(choice.get("options") or {})
        precision = {f"teachers.{choice['modality']}.options.precision": options.pop("precision", "fp32")}
        return {"teachers.dtype": choice.get("dtype", "")} | precision, {**choice, "options": options, "dtype": None}

    ours, same = parts(dict(choice))
    for uri in files.list_files(root, ".json"):
        if not files.name_of(uri).startswith(f"{choice['modality']}-{choice['kind']}-"):
            continue
        with contextlib.suppress(ValueError, TypeError):  # a damaged one says nothing here
            theirs, teacher = parts(_read_json(uri, {"choice": dict})["choice"])
            if teacher == same and (differ := [key for key in ours if ours[key] != theirs[key]]):
                said = ", ".join(f"{key}={theirs[key]}, not {ours[key]}" for key in differ)
                return f" (there is one with {said})"
    return ""


def _pointer(root: str, choice: Mapping[str, object]) -> str:
    return files.join(root, f"{choice['modality']}-{choice['kind']}-{_digest(dict(choice))}.json")


def _read_json(uri: str, keys: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object with these keys. Raises ValueError naming the file, NewerFormat."""
    try:
        said = json.loads(files.read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{uri} is no JSON ({error}): delete it and {REMEDY}") from None
    check_format(uri, said, FORMAT)
    wrong = [key for key, kind in keys.items() if not isinstance(said, dict) or not isinstance(said.get(key), kind)]
    if wrong:
        raise ValueError(f"{uri} has no usable {', '.join(wrong)}: delete it and {REMEDY}")
    return dict(said)


def _write_json(uri: str, value: object) -> None:
    data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
    if not files.exists(uri) or files.read_bytes(uri) != data:
        files.write_atomic(uri, data)
