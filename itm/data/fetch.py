"""The planned pairs as shards and sidecars hold them: encoded image or region file, caption, teacher vectors. Torch is not needed here.

`Fetch` only reads; `itm/data/pairs.py` decodes. So one process can do both, or a reader on another machine sends what it read, undecoded.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from itm.data import files
from itm.data.arrow import Columns, to_table
from itm.data.formats import Json
from itm.data.manifest import CHANGED, Manifest, SampleIndex
from itm.data.mix import MixedStore, Mixture, folders_of
from itm.data.plan import Plan
from itm.data.records import Caption, Problem
from itm.data.same_image import image_number
from itm.data.shards import Sample, index_shard, parse_range
from itm.data.sidecar import Sidecar, Store

_OPEN_SHARDS = 64
_READERS = 32  # reads at a time from an object store, where each waits for tens of milliseconds and a batch needs hundreds
_MOST_OPEN = 512  # of a window over more shards the others are opened again: a process may hold 1,024 files at least


@dataclass(frozen=True)
class Work:
    """One per-rank batch of the plan."""

    step: int
    micro: int
    rank: int


class _Shard(NamedTuple):
    """An open shard: its samples, the first caption row of each, and a file that is read at positions."""

    uri: str
    samples: list[SampleIndex]
    begins: list[int]
    file: pa.NativeFile


class _Image(NamedTuple):
    """A sample, and the columns that all pairs of its image share."""

    sample: Sample
    columns: Json


class Fetch:
    """Callable `Work -> pa.Table` of `plan.batch` rows, deterministic, for any number of threads.

    Columns: image_id (equal for rows of one image, `itm.data.same_image`), data (encoded image, or region file), teacher_image,
    teacher_text, key, caption, text, shard, problem (JSON of a `Problem`, or null: such a row's data, text and vectors mean nothing), step.
    For teachers that run in the training: sample (its bytes in the tar), caption_meta (JSON).
    """

    def __init__(
        self,
        split: str,
        manifest: Manifest | Mixture,
        plan: Plan,
        kind: str,
        stores: Mapping[str, Store | MixedStore],
        online: Collection[str] = (),
    ) -> None:
        """kind: `pixels` or `regions`, the file of a sample that is wanted. online: modalities whose teachers run in the training."""
        self.shards, self.folders = manifest.shards, folders_of(split, manifest)
        self.split, self.manifest, self.plan, self.kind, self.stores = split, manifest, plan, kind, stores
        self.online = frozenset(online)
        self.readers = _READERS if any(map(files.is_remote, dict.fromkeys(self.folders))) else 1
        self._caches()

    def _caches(self) -> None:
        """Per object, not per class: the shards and sidecars in use."""
        kept = min(_MOST_OPEN, max(_OPEN_SHARDS, self.plan.window))
        self._shard = lru_cache(kept)(self._open_shard)
        self._sidecar = lru_cache(2 * kept)(self._open_sidecar)
        self._pool = ThreadPoolExecutor(self.readers) if self.readers > 1 else None

    def __getstate__(self) -> Json:
        return {name: value for name, value in self.__dict__.items() if name not in ("_shard", "_sidecar", "_pool")}

    def __setstate__(self, state: Json) -> None:
        self.__dict__.update(state)
        self._caches()

    def __call__(self, work: Work) -> pa.Table:
        """Raises ValueError when not one pair of the batch can be used, or the shards are not those of the manifest."""
        return _table(self.read(work))

    def read(self, work: Work) -> Columns:
        """The same as numpy arrays and lists, for this process: a table would hold two copies more of each file."""
        epoch = self.plan.locate(work.step).epoch
        pairs = self.plan.batch_pairs(work.step, work.micro, work.rank).tolist()
        many = self._pool.map if self._pool else map
        begins = dict(many(lambda shard: (shard, self._shard(shard).begins), dict.fromkeys(shard for shard, _ in pairs)))
        numbers = [bisect_right(begins[shard], row) - 1 for shard, row in pairs]
        wanted = dict.fromkeys((shard, number) for (shard, _), number in zip(pairs, numbers, strict=True))
        samples = dict(zip(wanted, many(lambda key: self._sample(key[0], key[1], epoch), wanted), strict=True))
        rows = zip(pairs, numbers, strict=True)
        made = (self._pair(samples[shard, number], shard, row, row - begins[shard][number]) for (shard, row), number in rows)
        return _columns([{"problem": pair.row()} if isinstance(pair, Problem) else pair for pair in made], work)

    def _open_shard(self, shard: int) -> _Shard:
        info = self.shards[shard]
        uri = files.join(self.folders[shard], info.name)
        index = index_shard(uri, info.sha256)
        begins = [0, *accumulate(s.captions for s in index)]
        if (len(index), begins[-1]) != (info.samples, info.captions):
            held = f"{uri} holds {len(index)} samples with {begins[-1]} captions"
            raise ValueError(f"{held}, its manifest says {info.samples} with {info.captions}: {CHANGED}")
        return _Shard(uri, index, begins, files.open_file(uri))

    def _sample(self, shard: int, number: int, epoch: int) -> _Image | Problem:
        """An image of the plan, or why it cannot be used."""
        uri, index, _, file = self._shard(shard)
        start = index[number].start
        found = file.read_at(index[number].end - start, start)
        sample = parse_range(found, uri, start)
        name = self.shards[shard].name
        data = sample.regions if self.kind == "regions" else sample.image
        if data is None:
            return Problem(sample.key, name, "train", f"no {self.kind} in this sample")
        columns: Json = {"data": data, "key": sample.key, "shard": name, "image_id": image_number(sample, self.folders[shard])}
        if "image" in self.stores:
            vector = self._vector("image", shard, number, sample, None, epoch)
            if isinstance(vector, Problem):
                return vector
            columns["teacher_image"] = vector
        if "image" in self.online:
            columns["sample"] = found
        return _Image(sample, columns)

    def _pair(self, image: _Image | Problem, shard: int, row: int, ordinal: int) -> Json | Problem:
        if isinstance(image, Problem):
            return image
        sample, columns, caption = image.sample, dict(image.columns), image.sample.captions[ordinal]
        if "text" in self.stores:
            vector = self._vector("text", shard, row, sample, caption)
            if isinstance(vector, Problem):
                return vector
            columns["teacher_text"] = vector
        if "text" in self.online:
            columns["caption_meta"] = json.dumps(caption.meta)
        return columns | {"caption": caption.id, "text": caption.text}

    def _open_sidecar(self, modality: str, shard: int) -> Sidecar:
        return self.stores[modality].sidecar(self.shards[shard].name, self.shards[shard].sha256)

    def _vector(
        self, modality: str, shard: int, number: int, sample: Sample, caption: Caption | None, epoch: int = 0
    ) -> np.ndarray | Problem:
        """The vector of image or caption `number` of a shard, after checking that it is this sample's (and caption's).

        Of several views the mean, of which only the direction counts, or that of the epoch.
        """
        sidecar = self._sidecar(modality, shard)
        views = sidecar.header.views
        row = number * views
        theirs = (sidecar.keys[row], sidecar.captions[row] if sidecar.captions else None)
        ours = (sample.key, caption.id if caption else None)
        if theirs != ours:
            raise ValueError(f"{sidecar.uri}: row {row} is of {theirs}, the shard has {ours} there: run `itm teach` again")
        if sidecar.problems[row] is not None:
            return Problem(sample.key, self.shards[shard].name, "teach", f"no {modality} teacher vector: {sidecar.problems[row]}")
        if views > 1 and self.stores[modality].crops is None:
            return sidecar.vectors[row : row + views].astype(np.float32).mean(0)
        return sidecar.vectors[row + epoch % views].astype(np.float32)


def _table(columns: Columns) -> pa.Table:
    files_of = {name: pa.array(columns[name], pa.large_binary()) for name in ("data", "sample") if name in columns}
    return to_table(columns | files_of | {"problem": pa.array(columns["problem"], pa.string())})


def _columns(rows: list[Json], work: Work) -> Columns:
    """A row that cannot be used repeats the columns of a good one, beside its problem."""
    good = next((row for row in rows if "problem" not in row), None)
    if good is None:
        raise unusable(str(rows[0]["problem"]), len(rows), work.step)
    columns: Columns = {name: [row.get(name, value) for row in rows] for name, value in good.items()}
    vectors = {name: np.stack(values) for name, values in columns.items() if name.startswith("teacher_")}
    numbers = {"image_id": np.array(columns["image_id"], np.int64), "step": np.full(len(rows), work.step, np.int64)}
    return columns | vectors | {"problem": [row.get("problem") for row in rows]} | numbers


def unusable(problem: str, rows: int, step: int) -> ValueError:
    return ValueError(f"not one of the {rows} pairs of step {step} can be used; the first: {problem}")
