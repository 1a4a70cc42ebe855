"""Soft-label stores for other trainers: parquet tables, CUSA's own `.npy` dictionaries, or members of WebDataset tars.

    parquet      <output>/<modality>-<teacher id>/<shard stem>.parquet     key, image_id, [view], [caption, text], vector; one row a vector
    npy          <output>/<split>_<modality>_<teacher id>.npy              CUSA's form, docs/methods/cusa.md#stored-teacher-vectors
    webdataset   <output>/<shard>.tar                                      the samples, and beside them teacher_image.npy, teacher_text.npy

Vectors are at unit length, as the store has them: only their cosines are ever used. A row without a vector is left out and counted; in a
webdataset member it is a row of zeros, so that rows stay with their captions. The same store gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from itm.data import files
from itm.data.manifest import Manifest, ShardInfo, write_manifest
from itm.data.records import Problem
from itm.data.shards import Sample, copy_samples, read_manifest, read_samples
from itm.data.sidecar import Store, open_store

_SAME = 0.02  # two vectors of one image, scored in other batches and rounded, differ by less
TYPES: dict[str, type[np.floating]] = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class Exported:
    """What was written: a file or a folder, the vectors in it, and the rows that have none."""

    uri: str
    vectors: int
    without: int


@dataclass(frozen=True)
class Row:
    """A vector (D,) and what it belongs to; caption and text are "" in an image store. vector: None where the teacher could not read.

    view: 0, or which of several views of the image it is of.
    """

    sample: Sample
    caption: str
    text: str
    vector: np.ndarray | None
    view: int = 0


def finished_stores(root: str, wanted: Sequence[str] = ()) -> list[Store]:
    """The stores below `root` that are whole, or those of the teacher ids `wanted`. Raises ValueError where there is none."""
    if wanted:
        return [open_store(root, teacher) for teacher in wanted]
    names = sorted(map(files.name_of, files.list_folders(root))) if files.exists(root) else []
    found = [open_store(root, name) for name in names if files.exists(files.join(root, name, "store.json"))]
    if not found:
        raise ValueError(f"no finished soft-label store below {root}: run `itm teach`, or name the folder of the stores with --stores")
    return found


def export_stores(form: str, stores: Sequence[Store], split_uri: str, output: str, dtype: str = "fp32") -> list[Exported]:
    """Write `stores` of the split at `split_uri` in `form` below the folder `output`.

    dtype: of the numbers, fp32 or fp16. Raises ValueError for an unknown form, a store of other shards, and two webdataset stores of one
    modality.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    manifest = read_manifest(split_uri)
    for store in stores:
        store.check((shard.name, shard.sha256) for shard in manifest.shards)
    return FORMS[form](stores, manifest, split_uri, output, TYPES[dtype])


def rows_of(store: Store, split_uri: str, shard: ShardInfo) -> Iterator[Row]:
    """The rows of one shard in tar order, each with its sample. Raises ValueError where sample and store disagree."""
    sidecar = store.sidecar(shard.name, shard.sha256)
    vectors = iter(zip(sidecar.keys, sidecar.captions or sidecar.keys, sidecar.vectors, sidecar.ok, strict=True))
    refused = {key for key, _ in sidecar.header.unreadable}
    for sample in read_samples(files.join(split_uri, shard.name), shard.sha256):
        if isinstance(sample, Problem) or sample.key in refused:
            continue
        captions = [(c.id, c.text) for c in sample.captions] if store.modality == "text" else [("", "")] * store.views
        for number, (caption, text) in enumerate(captions):
            key, of, vector, ok = next(vectors, ("", "", np.empty(0), False))
            if key != sample.key or (caption and of != caption):
                raise ValueError(f"{sidecar.uri}: the row of {key!r} stands where sample {sample.key!r} of {shard.name} is")
            yield Row(sample, caption, text, vector if ok else None, number if store.views > 1 else 0)


def _parquet(stores: Sequence[Store], manifest: Manifest, split_uri: str, output: str, dtype: type[np.floating]) -> list[Exported]:
    return [_parquet_of(store, manifest, split_uri, files.join(output, f"{store.modality}-{store.teacher}"), dtype) for store in stores]


def _parquet_of(store: Store, manifest: Manifest, split_uri: str, folder: str, dtype: type[np.floating]) -> Exported:
    """One file a shard, so that memory holds one shard."""
    count = without = 0
    for shard in manifest.shards:
        rows = list(rows_of(store, split_uri, shard))
        kept = [row for row in rows if row.vector is not None]
        columns: dict[str, pa.Array] = {
            "key": pa.array([row.sample.key for row in kept], pa.string()),
            "image_id": pa.array([str(_image_id(row.sample)) for row in kept], pa.string()),
        }
        if store.views > 1:
            columns["view"] = pa.array([row.view for row in kept], pa.int16())
        if store.modality == "text":
            columns["caption"] = pa.array([row.caption for row in kept], pa.string())
            columns["text"] = pa.array([row.text for row in kept], pa.string())
        numbers = np.array([row.vector for row in kept], dtype).reshape(-1)
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(numbers), store.width)
        with files.atomic_stream(files.join(folder, f"{shard.name.removesuffix('.tar')}.parquet")) as stream:
            pq.write_table(pa.table(columns), stream)
        count, without = count + len(kept), without + len(rows) - len(kept)
    return Exported(folder, count, without)


def _npy(stores: Sequence[Store], manifest: Manifest, split_uri: str, output: str, dtype: type[np.floating]) -> list[Exported]:
    return [_npy_of(s, manifest, split_uri, files.join(output, f"{manifest.split}_{s.modality}_{s.teacher}.npy"), dtype) for s in stores]


def _npy_of(store: Store, manifest: Manifest, split_uri: str, uri: str, dtype: type[np.floating]) -> Exported:
    """One pickled dict, {image_id: (1, D)} or {caption: (D,)}: the whole split is held in memory, as its reader will hold it.

    An image has one vector there: of several views their mean, at unit length.
    """
    held: dict[object, np.ndarray] = {}
    without = 0
    for shard in manifest.shards:
        for sample, rows in _by_sample(rows_of(store, split_uri, shard)):
            there = [(row.text, row.vector) for row in rows if row.vector is not None]
            without += len(rows) - len(there)
            if store.modality == "text":
                for text, vector in there:
                    held.setdefault(text, vector.astype(dtype))
            elif there:
                vector = _mean([vector for _, vector in there]).astype(dtype)[None]
                known = held.setdefault(_image_id(sample), vector)
                if np.abs(known.astype(np.float32) - vector).max() > _SAME:
                    raise ValueError(
                        f"{shard.name}: two images of the id {_image_id(sample)!r} have different vectors, and npy holds one an id: "
                        "export parquet or webdataset, or give the images different ids"
                    )
    with files.atomic_stream(uri) as stream:
        np.save(stream, np.array(held, dtype=object), allow_pickle=True)
    return Exported(uri, len(held), without)


def _mean(vectors: Sequence[np.ndarray]) -> np.ndarray:
    if len(vectors) == 1:
        return vectors[0]
    mean: np.ndarray = np.mean([vector.astype(np.float32) for vector in vectors], axis=0)
    return mean / np.linalg.norm(mean)


def _webdataset(stores: Sequence[Store], manifest: Manifest, split_uri: str, output: str, dtype: type[np.floating]) -> list[Exported]:
    """The shards again under their names, each sample with its vectors; captions stay in the order of their rows."""
    modalities = [store.modality for store in stores]
    if len(set(modalities)) < len(modalities):
        raise ValueError(f"two stores of one modality ({', '.join(s.teacher for s in stores)}): name one of each with --teacher")
    if files.resolve(output) == files.resolve(split_uri):
        raise ValueError(f"the samples are copied, so the output must be another folder than {split_uri}")
    counts = [0, 0]
    infos = []
    for shard in manifest.shards:
        members: dict[str, dict[str, bytes]] = {}
        samples: dict[str, Sample] = {}
        for store in stores:
            for sample, rows in _by_sample(rows_of(store, split_uri, shard)):
                samples[sample.key] = sample
                members.setdefault(sample.key, {})[f"teacher_{store.modality}.npy"] = _npy_bytes(_filled(rows, store, dtype))
                there = sum(row.vector is not None for row in rows)
                counts = [counts[0] + there, counts[1] + len(rows) - there]
        infos.append(copy_samples(files.join(output, shard.name), samples.values(), manifest.split, partial(_beside, members)))
    write_manifest(output, Manifest(split=manifest.split, source=f"{split_uri} with teacher vectors", shards=infos))
    return [Exported(output, *counts)]


def _by_sample(rows: Iterator[Row]) -> Iterator[tuple[Sample, list[Row]]]:
    held: list[Row] = []
    for row in rows:
        if held and held[0].sample is not row.sample:
            yield held[0].sample, held
            held = []
        held.append(row)
    if held:
        yield held[0].sample, held


def _filled(rows: list[Row], store: Store, dtype: type[np.floating]) -> np.ndarray:
    """(D,) of an image, (views, D) of its views, (captions, D) of a sample's captions; zeros where there is no vector."""
    vectors = np.stack([np.zeros(store.width, dtype) if row.vector is None else row.vector.astype(dtype) for row in rows])
    return vectors if store.modality == "text" or store.views > 1 else vectors[0]


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _beside(members: dict[str, dict[str, bytes]], sample: Sample) -> dict[str, bytes]:
    return members[sample.key]


def _image_id(sample: Sample) -> object:
    """What the source called the image; ours is its key."""
    return sample.meta.get("image_id", sample.key)


FORMS: dict[str, Callable[[Sequence[Store], Manifest, str, str, type[np.floating]], list[Exported]]] = {
    "parquet": _parquet,
    "npy": _npy,
    "webdataset": _webdataset,
}
