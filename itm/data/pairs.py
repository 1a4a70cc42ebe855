"""A planned batch -> its rows: reads the byte ranges of its samples, prepares them, and attaches the teacher vectors by key.

A pair that cannot be used gives its place to the next good pair of the same batch, so every batch keeps its size; the reason
travels in the column `problem` of the place it left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from itm.data import files
from itm.data.collate import to_table
from itm.data.manifest import CHANGED, Manifest, SampleIndex
from itm.data.plan import Plan
from itm.data.preprocess import Inputs, draw
from itm.data.records import Caption, Problem
from itm.data.shards import Sample, index_shard, read_range
from itm.data.sidecar import Sidecar, Store

_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Work:
    """One per-rank batch of the plan."""

    step: int
    micro: int
    rank: int


class Pairs:
    """Callable `Work -> pa.Table` of exactly `plan.batch` rows; deterministic, so it can run anywhere and again.

    Columns: image_id (number of the sample in its split), pixels | regions boxes mask, tokens, token_mask, teacher_image,
    teacher_text, key, caption, problem (JSON of a `Problem`, or null), step.
    """

    def __init__(self, split: str, manifest: Manifest, plan: Plan, inputs: Inputs, stores: dict[str, Store]) -> None:
        self.split, self.manifest, self.plan, self.inputs, self.stores = split, manifest, plan, inputs, stores
        self.first_image = np.concatenate([[0], np.cumsum([s.samples for s in manifest.shards])])
        self._caches()

    def _caches(self) -> None:
        """Per object, not per class: indexes and sidecars of the shards in use."""
        self._index = lru_cache(_OPEN_SHARDS)(self._read_index)
        self._sidecar = lru_cache(2 * _OPEN_SHARDS)(self._open_sidecar)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_index", "_sidecar")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._caches()

    def __call__(self, work: Work) -> pa.Table:
        """Raises ValueError when not one pair of the batch can be used, or the shards are not those of the manifest."""
        pairs = self.plan.batch_pairs(work.step, work.micro, work.rank)
        epoch = self.plan.locate(work.step).epoch
        samples: dict[tuple[int, int], dict[str, Any] | Problem] = {}
        rows: list[dict[str, Any] | Problem] = []
        for shard, row in pairs.tolist():
            number, ordinal = self._place(shard, row)
            if (shard, number) not in samples:
                samples[shard, number] = self._sample(shard, number, epoch)
            rows.append(self._pair(samples[shard, number], shard, row, ordinal))
        self._tokenise(rows, self.manifest.shards[int(pairs[0, 0])].name)
        return _fill(rows, work)

    def _read_index(self, shard: int) -> tuple[list[SampleIndex], np.ndarray]:
        """The samples of a shard, and the first caption row of each."""
        info = self.manifest.shards[shard]
        uri = files.join(self.split, info.name)
        index = index_shard(uri, info.sha256)
        begins = np.concatenate([[0], np.cumsum([s.captions for s in index], dtype=np.int64)])
        if (len(index), begins[-1]) != (info.samples, info.captions):
            raise ValueError(
                f"{uri} holds {len(index)} samples with {begins[-1]} captions, its manifest says {info.samples} with {info.captions}: "
                f"{CHANGED}"
            )
        return index, begins

    def _place(self, shard: int, row: int) -> tuple[int, int]:
        """Caption row of a shard -> (sample, ordinal of its caption)."""
        begins = self._index(shard)[1]
        number = int(np.searchsorted(begins, row, side="right")) - 1
        return number, row - int(begins[number])

    def _sample(self, shard: int, number: int, epoch: int) -> dict[str, Any] | Problem:
        """The image columns of a sample (and its `sample` itself), or why it cannot be used."""
        info, index = self.manifest.shards[shard], self._index(shard)[0][number]
        sample = read_range(files.join(self.split, info.name), index.start, index.end)
        data = sample.regions if self.inputs.image.kind == "regions" else sample.image
        if data is None:
            return Problem(sample.key, info.name, "train", f"no {self.inputs.image.kind} in this sample")
        try:
            columns: dict[str, Any] = dict(self.inputs.image_columns(data, draw(self.plan.seed, epoch, sample.key)))
        except ValueError as error:
            return Problem(sample.key, info.name, "train", str(error))
        if "image" in self.stores:
            vector = self._vector("image", shard, number, sample, None)
            if isinstance(vector, Problem):
                return vector
            columns["teacher_image"] = vector
        return columns | {"sample": sample, "image_id": int(self.first_image[shard]) + number}

    def _pair(self, prepared: dict[str, Any] | Problem, shard: int, row: int, ordinal: int) -> dict[str, Any] | Problem:
        if isinstance(prepared, Problem):
            return prepared
        columns = dict(prepared)
        sample: Sample = columns.pop("sample")
        caption = sample.captions[ordinal]
        if "text" in self.stores:
            vector = self._vector("text", shard, row, sample, caption)
            if isinstance(vector, Problem):
                return vector
            columns["teacher_text"] = vector
        return columns | {"key": sample.key, "caption": caption.id, "text": caption.text}

    def _open_sidecar(self, modality: str, shard: int) -> Sidecar:
        info = self.manifest.shards[shard]
        return self.stores[modality].sidecar(info.name, info.sha256)

    def _vector(self, modality: str, shard: int, row: int, sample: Sample, caption: Caption | None) -> np.ndarray | Problem:
        """Row `row` of a sidecar, after checking that it is this sample's (and caption's)."""
        sidecar = self._sidecar(modality, shard)
        theirs = (sidecar.keys[row], sidecar.captions[row] if sidecar.captions else None)
        ours = (sample.key, caption.id if caption else None)
        if theirs != ours:
            raise ValueError(f"{sidecar.uri}: row {row} is of {theirs}, the shard has {ours} there: run `itm teach` again")
        if sidecar.problems[row] is not None:
            return Problem(sample.key, self.manifest.shards[shard].name, "teach", f"no {modality} teacher vector: {sidecar.problems[row]}")
        return sidecar.vectors[row].astype(np.float32)

    def _tokenise(self, rows: list[dict[str, Any] | Problem], shard: str) -> None:
        """Adds tokens (max_length,) and token_mask to each row; a caption that cannot be tokenised turns its row into a Problem."""
        good = [i for i, row in enumerate(rows) if not isinstance(row, Problem)]
        texts = [rows[i]["text"] for i in good]  # type: ignore[index]
        try:
            encoded = [self.inputs.captions(texts)] if texts else []
        except ValueError:
            encoded = self._one_by_one(rows, good, shard)
            good = [i for i in good if not isinstance(rows[i], Problem)]
        tokens = [t for captions in encoded for t in captions.tokens.numpy()]
        masks = [m for captions in encoded for m in captions.mask.numpy()]
        for i, token, mask in zip(good, tokens, masks, strict=True):
            room = self.inputs.tokenizer.max_length - len(token)
            rows[i] |= {"tokens": np.pad(token, (0, room)), "token_mask": np.pad(mask, (0, room))}  # type: ignore[operator]

    def _one_by_one(self, rows: list[Any], good: list[int], shard: str) -> list[Any]:
        encoded = []
        for i in good:
            try:
                encoded.append(self.inputs.captions([rows[i]["text"]]))
            except ValueError as error:
                rows[i] = Problem(rows[i]["key"], shard, "train", str(error), "caption")
        return encoded


def _fill(rows: list[dict[str, Any] | Problem], work: Work) -> pa.Table:
    good = [i for i, row in enumerate(rows) if not isinstance(row, Problem)]
    if not good:
        raise ValueError(f"not one of the {len(rows)} pairs of step {work.step} can be used; the first: {rows[0]}")
    after = np.searchsorted(good, np.arange(len(rows))) % len(good)  # the row itself, or the next good one, round the end
    chosen: list[Any] = [rows[good[k]] for k in after]
    columns: dict[str, Any] = {
        name: np.stack([row[name] for row in chosen]) if isinstance(value, np.ndarray) else [row[name] for row in chosen]
        for name, value in chosen[0].items()
        if name != "text"
    }
    problems = pa.array([row.row() if isinstance(row, Problem) else None for row in rows], pa.string())
    return to_table(columns | {"image_id": np.array(columns["image_id"], np.int64), "problem": problems, "step": [work.step] * len(rows)})
