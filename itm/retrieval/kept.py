"""The encoded split that a search without an index makes for itself and keeps in one Arrow file for each pair of weights and manifest."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from itm.data import files
from itm.data.formats import check_format
from itm.data.shards import read_manifest
from itm.evaluation.dataset import EncodedSplit, Names, encode_split
from itm.matchers.mean import beside
from itm.matchers.weights import weights_hash
from itm.retrieval.sides import FIELDS
from itm.types import Encoded

FORMAT = 1


def load_split(matcher: Any, shards: str, index: str, device: str | torch.device = "cpu", uni: bool = False) -> EncodedSplit:
    """The encoded split, from the cache or made now. A change of weights, preparation or shards is another file.

    uni: the vectors of uni-modal heads are needed, which files of earlier versions do not hold: those are made again. A mean has the files
    of its members. Raises ValueError where a member cannot read images that another one reads.
    """
    if len(matcher.averaged) > 1:
        return _joined([load_split(member, shards, index, device, uni) for member in matcher.averaged], shards)
    uri = files.join(index, f"{matcher_identity(matcher)}-{read_manifest(shards).fingerprint()}.arrow")
    if files.exists(uri):
        kept = _read_index(uri, shards)
        if not (uni and matcher.uni_width) or kept.images.uni is not None:
            return kept
    kept_there = _is_writable(index)
    split = encode_split(matcher, shards, device=device, bare=True)
    for problem in split.problems:
        print(f"not searchable: {problem.key} in {problem.shard} ({problem.stage}: {problem.reason})")
    if kept_there:
        _write_index(uri, split)
    return split


def _is_writable(index: str) -> bool:
    """Warns where not: what is encoded is of use without being kept."""
    try:
        files.check_writable(index)
    except ValueError as error:
        warnings.warn(
            f"{error}. The encoded split is not kept, and made again by the next search; --index names a folder for it", stacklevel=3
        )
        return False
    return True


def _joined(splits: Sequence[EncodedSplit], shards: str) -> EncodedSplit:
    """The split as a mean sees it."""
    names = splits[0].names
    for number, other in enumerate(splits[1:], 2):
        lost = set(names.image_keys) ^ set(other.names.image_keys)
        if lost or names.caption_ids != other.names.caption_ids:
            what = f"{len(lost)} images, e.g. {min(lost)!r}" if lost else "some captions"
            raise ValueError(f"{shards}: only one of the members 1 and {number} of the mean can read {what}")
    return EncodedSplit(beside([split.images for split in splits]), beside([split.captions for split in splits]), names)


def matcher_identity(matcher: Any) -> str:
    """12 hex digits of what decides the encoding: weights, architecture and preparation; of a mean, those of its members."""
    if len(matcher.averaged) > 1:
        return hashlib.sha256("+".join(map(matcher_identity, matcher.averaged)).encode()).hexdigest()[:12]
    tokenizer = matcher.inputs.tokenizer
    choices = (weights_hash(matcher), matcher.inputs.image, tokenizer.vocab_size, tokenizer.max_length, tokenizer.clean)
    return hashlib.sha256(repr(choices).encode()).hexdigest()[:12]


def _write_index(uri: str, split: EncodedSplit) -> None:
    """Two Arrow streams in one file, images and then captions."""
    names = split.names
    images = {"key": pa.array(names.image_keys), "shard": pa.array([files.name_of(s) for s in names.image_shards])}
    captions = {"id": pa.array(names.caption_ids), "text": pa.array(names.texts), "image": pa.array(names.caption_image.numpy())}
    with files.atomic_stream(uri) as stream:
        for columns, encoded in ((images, split.images), (captions, split.captions)):
            table = pa.table(columns | {field: _column(value) for field in FIELDS if (value := getattr(encoded, field)) is not None})
            table = table.replace_schema_metadata({"itm": json.dumps({"format": FORMAT})})
            with pa.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table)


def _column(tensor: torch.Tensor) -> pa.Array:
    flat = tensor.flatten(1).contiguous()
    values = pa.array(flat.flatten().numpy().astype(np.uint8 if tensor.dtype == torch.bool else np.float32))
    kind = pa.fixed_shape_tensor(values.type, tensor.shape[1:])
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(values, flat.shape[1]))


def _read_index(uri: str, shards: str) -> EncodedSplit:
    stream = pa.BufferReader(files.read_bytes(uri))
    images, captions = pa.ipc.open_stream(stream).read_all(), pa.ipc.open_stream(stream).read_all()
    check_format(uri, json.loads((images.schema.metadata or {}).get(b"itm", b"{}")), FORMAT)
    names = Names(
        image_keys=images["key"].to_pylist(),
        caption_ids=captions["id"].to_pylist(),
        caption_image=torch.tensor(captions["image"].to_numpy()),
        texts=captions["text"].to_pylist(),
        image_shards=[files.join(shards, name) for name in images["shard"].to_pylist()],
    )
    return EncodedSplit(_encoded(images), _encoded(captions), names)


def _encoded(table: pa.Table) -> Encoded:
    tensors: Any = {}
    for field in FIELDS:
        if field in table.column_names:
            array = table[field].combine_chunks()
            array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
            tensor = torch.tensor(array.to_numpy_ndarray())
            tensors[field] = tensor.bool() if field == "mask" else tensor
    return Encoded(each=(), **tensors)
