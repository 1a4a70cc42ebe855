"""The files of an index, one Arrow IPC file a shard and side, and `index.json`, written last.

    <index>/<split>/<shard stem>.arrow             images: key, image, meta:<field>, and what a matcher made of them; rows in tar order
    <index>/<split>/<shard stem>.captions.arrow    captions: id, text, image (row in the other file), and what a matcher made of them
    <index>/index.json                             which shards are in it, of which matcher: its presence says that the index is whole

Vectors are `vector` (and `uni` of uni-modal heads) as fp16, fp32, or int8 codes with one fp32 `vector.scale` a row. Late interactions and
joint encoders also have `parts`, a list of vectors a row, as long as the row has real parts, in fp16 (fp32 where vectors are), and `mask`.
Of a mean each member has columns of its own, `0.vector`, `1.vector`, ... The schema metadata says of which shard and matcher a file is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import torch
from pyarrow import ipc
from torch import Tensor

from itm.data import files
from itm.data.formats import Json, NewerFormat, check_format, read_json
from itm.types import Encoded

FORMAT = 1
CATALOGUE_FORMAT = 2
"""Of `index.json` that earlier versions would misread: it removes images, or screens by centroids. All others say 1."""
NAME = "index.json"
OWN, CENTROIDS = "own", "centroids"
"""What proposes candidates, beside the URI of a dual encoder."""
DTYPES = ("fp16", "int8", "fp32")
LONGEST = 200
"""Characters of a text field of a sample that is kept to filter by."""
_TORCH = {"fp16": torch.float16, "fp32": torch.float32}
_ARROW: dict[torch.dtype, pa.DataType] = {torch.float16: pa.float16(), torch.float32: pa.float32(), torch.int8: pa.int8()}


@dataclass(frozen=True)
class Choices:
    """What an index is made with. matcher: identity of its weights and preparation; fields: metadata that is kept, None = all flat ones."""

    matcher: str
    dtype: str = "fp16"
    fields: tuple[str, ...] | None = None

    def said(self) -> Json:
        return {"matcher": self.matcher, "dtype": self.dtype, "fields": None if self.fields is None else sorted(self.fields)}

    def made_from(self, sha256: str) -> str:
        """12 hex digits of what the files of a shard depend on."""
        return hashlib.sha256(json.dumps([FORMAT, self.said(), sha256], sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Entry:
    """A shard in an index. gone: the split has it no more, so its images are not found; its files stay, in case it comes back.

    removed: keys of images that are not to be found, though the shard has them, and how many captions each has.
    """

    name: str
    sha256: str
    bytes: int
    images: int
    captions: int
    rejected: int
    gone: bool = False
    removed: Mapping[str, int] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".tar")

    def said(self) -> Json:
        return {name: value for name, value in asdict(self).items() if value is not False and value != {}}


@dataclass(frozen=True)
class SplitEntry:
    """A split in an index: where its shards lie, and the folder of the index that holds their vectors."""

    uri: str
    folder: str
    fingerprint: str
    shards: list[Entry]


@dataclass(frozen=True)
class Catalogue:
    """`index.json`. settings: what was chosen after the vectors were made: `screen`, `faiss`."""

    choices: Choices
    kind: str
    splits: list[SplitEntry]
    settings: Json = field(default_factory=dict)

    def said(self) -> Json:
        splits = [{**asdict(s), "shards": [entry.said() for entry in s.shards]} for s in self.splits]
        newer = self.settings.get("screen", {}).get("by") == CENTROIDS or any(e.removed for s in self.splits for e in s.shards)
        own = CATALOGUE_FORMAT if newer else FORMAT
        return {"format": own, **self.choices.said(), "kind": self.kind, "splits": splits, "settings": self.settings}


def read_catalogue(uri: str) -> Catalogue:
    """Raises ValueError for a folder without a finished index, and for a damaged one; NewerFormat."""
    place = files.join(uri, NAME)
    if not files.exists(place):
        started = sum(len(files.list_files(folder, ".arrow")) for folder in files.list_folders(uri))
        half = f", though it holds {started} files of one that was begun" if started else ""
        raise ValueError(f"no finished index at {uri} ({NAME} is missing){half}: run `itm index`")
    said = read_json(place, CATALOGUE_FORMAT)
    try:
        choices = Choices(said["matcher"], said["dtype"], None if said["fields"] is None else tuple(said["fields"]))
        splits = [SplitEntry(**{**s, "shards": [Entry(**entry) for entry in s["shards"]]}) for s in said["splits"]]
        return Catalogue(choices, said["kind"], splits, said["settings"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place} is no index of format {CATALOGUE_FORMAT} ({error}): delete it and run `itm index` again") from None


def write_catalogue(uri: str, catalogue: Catalogue) -> None:
    data = (json.dumps(catalogue.said(), indent=1, sort_keys=True) + "\n").encode()
    place = files.join(uri, NAME)
    if not files.exists(place) or files.read_bytes(place) != data:
        files.write_atomic(place, data)


# --- one shard --------------------------------------------------------------------------------------------------------------------------


def captions_uri(images_uri: str) -> str:
    return images_uri.removesuffix(".arrow") + ".captions.arrow"


def write_rows(uri: str, header: Json, named: Mapping[str, pa.Array], encoded: Encoded, dtype: str) -> None:
    """One side of a shard. Equal input gives equal bytes."""
    columns = dict(named) | _columns(encoded, dtype)
    table = pa.table(columns).replace_schema_metadata({"itm": json.dumps({"format": FORMAT, **header}, sort_keys=True)})
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    files.write_atomic(uri, sink.getvalue().to_pybytes())


def read_rows(uri: str) -> pa.Table:
    """One side of a shard, memory-mapped where it is a local file, else read once. Raises ValueError naming the file; NewerFormat."""
    try:
        filesystem, path = files.resolve(uri)
        source = pa.memory_map(path) if filesystem.type_name == "local" else pa.BufferReader(files.read_view(uri))
        table = ipc.open_file(source).read_all()
        check_format(uri, json.loads(table.schema.metadata[b"itm"]), FORMAT)
    except NewerFormat:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{uri}, which the index needs, cannot be read ({error}): run `itm index` again") from None
    return table


def read_header(uri: str) -> Json | None:
    """What the file of a shard's images says of itself; None where there is none that is whole. Raises NewerFormat."""
    if not files.exists(uri):
        return None
    try:
        with files.open_file(uri) as stream:
            metadata = ipc.open_file(stream).schema.metadata
        said = json.loads(metadata[b"itm"])
        check_format(uri, said, FORMAT)
        return dict(said)
    except NewerFormat:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None


def metadata_columns(metas: Sequence[Json], fields: Sequence[str] | None) -> dict[str, pa.Array]:
    """Flat fields of samples, `meta:<field>`: numbers as numbers where all rows have some, else as texts; long texts are left out."""
    names = sorted({name for meta in metas for name, value in meta.items() if _flat(value)} - {"split", "captions"})
    found = {}
    for name in names if fields is None else [n for n in names if n in fields]:
        values = [value if _flat(value := meta.get(name)) else None for meta in metas]
        there = [value for value in values if value is not None]
        if all(type(value) is int and abs(value) < 1 << 63 for value in there):
            found[f"meta:{name}"] = pa.array(values, pa.int64())
        elif all(type(value) in (int, float) for value in there):
            found[f"meta:{name}"] = pa.array([None if v is None else float(v) for v in values], pa.float64())
        else:
            found[f"meta:{name}"] = pa.array([None if v is None else str(v) for v in values], pa.string())
    return found


def _flat(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= LONGEST)


def _columns(encoded: Encoded, dtype: str) -> dict[str, pa.Array]:
    if encoded.each:
        members = enumerate(encoded.each)
        return {f"{n}.{name}": column for n, own in members for name, column in _columns(own, dtype).items()}
    found: dict[str, pa.Array] = {}
    for name in ("vector", "uni"):
        value = getattr(encoded, name)
        if value is not None:
            codes, scale = stored(value.float(), dtype)
            found[name] = _fixed(codes)
            if scale is not None:
                found[f"{name}.scale"] = pa.array(scale.numpy())
    if encoded.parts is not None:
        ends = _ends(encoded.parts, encoded.mask)
        kind = _TORCH.get(dtype, torch.float16)
        found["parts"] = _ragged(encoded.parts.to(kind), ends)
        if encoded.mask is not None:
            same = encoded.mask.shape[1] == encoded.parts.shape[1]
            found["mask"] = _ragged(encoded.mask.to(torch.int8), ends if same else torch.full_like(ends, encoded.mask.shape[1]))
    return found


def stored(vectors: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """(N,D) float32 as a file has it. int8: code = round(v / scale), scale = the largest |v| of the row / 127."""
    if dtype != "int8":
        return vectors.to(_TORCH[dtype]), None
    scale = vectors.abs().amax(1) / 127
    return (vectors / scale.clamp(min=1e-30)[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def check_vectors(encoded: Encoded, what: str, keys: Sequence[str]) -> None:
    """Raises ValueError naming the first row that nothing could find: a vector of zeros, or not finite."""
    for own in encoded.each or [encoded]:
        for vectors in (own.vector, own.uni):
            if vectors is None:
                continue
            lengths = vectors.float().square().sum(1)
            bad = (~(lengths.isfinite() & (lengths > 0))).nonzero()[:, 0].tolist()
            if bad:
                how = "of zeros" if lengths[bad[0]] == 0 else "that is not finite"
                raise ValueError(f"{what} {keys[bad[0]]!r} has a vector {how}, as have {len(bad)} in all: mend the matcher before indexing")


def _ends(parts: Tensor, mask: Tensor | None) -> Tensor:
    """(N,) parts of each row that are stored: up to the last real one."""
    count = parts.shape[1]
    if mask is None or mask.shape[1] != count:
        return torch.full((len(parts),), count)
    return (mask.int() * torch.arange(1, count + 1)).amax(1).clamp(min=1)


def _fixed(tensor: Tensor) -> pa.Array:
    """(N,D) as one list of D a row."""
    return pa.FixedSizeListArray.from_arrays(_flat_values(tensor), tensor.shape[1])


def _ragged(tensor: Tensor, ends: Tensor) -> pa.Array:
    """(N,K) or (N,K,D), of each row the first `ends` (N,)."""
    kept = tensor[torch.arange(tensor.shape[1]) < ends[:, None]]
    offsets = pa.array(np.concatenate([[0], ends.numpy().cumsum()]), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, _flat_values(kept) if kept.dim() == 1 else _fixed(kept))


def _flat_values(tensor: Tensor) -> pa.Array:
    return pa.array(tensor.contiguous().flatten().numpy(), _ARROW[tensor.dtype])
