"""The planned pairs, ready for the matcher: what `Fetch` read, with images decoded, resized, augmented, and captions tokenised.

A pair that cannot be used gives its place to the next good pair of its batch, so all batches keep their size and every other pair
keeps its place; the reason travels in the column `problem` of the place it left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from itm.data.arrow import Columns, to_columns, to_table
from itm.data.buffers import Buffers
from itm.data.fetch import Fetch, Work, unusable
from itm.data.manifest import Manifest
from itm.data.mix import MixedStore, Mixture
from itm.data.plan import Plan
from itm.data.preprocess import Draw, Inputs, draw
from itm.data.records import Caption, Problem
from itm.data.shards import Sample, parse_range
from itm.data.sidecar import Store
from itm.types import Captions

__all__ = ["Pairs", "Work"]
READ = ("data", "sample", "text", "caption_meta", "shard", "problem")
"""Columns of `Fetch` that have served when a batch is prepared."""

Payload = Callable[[Sample | Caption], bytes]
"""`prepare` of a teacher."""


class Pairs:
    """Callable `Work -> pa.Table` of exactly `plan.batch` rows; deterministic, so it can run anywhere and again.

    Columns: image_id (equal for rows of one image, `itm.data.same_image`), pixels | regions boxes mask, tokens, token_mask, teacher_image,
    teacher_text, key, caption, problem (JSON of a `Problem`, or null), step; online_image, online_text: what a teacher that runs in the
    training made of the row, as bytes.
    """

    def __init__(
        self,
        split: str,
        manifest: Manifest | Mixture,
        plan: Plan,
        inputs: Inputs,
        stores: Mapping[str, Store | MixedStore],
        online: Mapping[str, Payload] | None = None,
    ) -> None:
        """online: by modality, how a teacher that runs in the training prepares a row; ValueError = the row cannot be used."""
        self.online = dict(online or {})
        self.fetch = Fetch(split, manifest, plan, inputs.image.kind, stores, self.online)
        self.inputs = inputs
        self.buffers = Buffers()

    def __call__(self, work: Work) -> pa.Table:
        """Raises ValueError when not one pair of the batch can be used, or the shards are not those of the manifest."""
        columns = self.prepare(self.fetch.read(work))
        payloads = {name: pa.array(value, pa.large_binary()) for name, value in columns.items() if name.startswith("online_")}
        return to_table(columns | payloads)

    def prepare(self, fetched: pa.Table | Columns) -> Columns:
        """The columns of one batch that `fetch` read; those given may be written to. Raises ValueError when not one pair can be used."""
        rows = to_columns(fetched) if isinstance(fetched, pa.Table) else fetched
        images = self._images(rows)
        words = self._words(rows) | {f"online_{modality}": _payloads(prepare, rows, modality) for modality, prepare in self.online.items()}
        problems, keep = rows["problem"], {name: value for name, value in rows.items() if name not in READ}
        good = [i for i, problem in enumerate(problems) if problem is None]
        if not good:
            raise unusable(problems[0], len(problems), int(rows["step"][0]))
        columns = keep | images | words
        if len(good) < len(problems):
            after = np.searchsorted(good, np.arange(len(problems))) % len(good)  # the row itself, or the next good one, round the end
            columns = {name: _take(value, np.array(good)[after]) for name, value in columns.items()}
        return columns | {"problem": problems, "step": rows["step"]}

    def _images(self, rows: Columns) -> Columns:
        """Image columns; an image that cannot be read turns its rows into problems. Of rows of one sample the first is decoded."""
        epoch = self.fetch.plan.locate(int(rows["step"][0])).epoch
        columns = {name: self.buffers.empty(shape) for name, shape in self.inputs.image.shapes(len(rows["key"])).items()}
        row_of: dict[tuple[str, str], int] = {}
        for i, sample in enumerate(zip(rows["shard"], rows["key"], strict=True)):
            if rows["problem"][i] is not None:
                continue
            if sample in row_of:
                rows["problem"][i] = rows["problem"][row_of[sample]]
                for array in columns.values():
                    array[i] = array[row_of[sample]]
                continue
            row_of[sample] = i
            target = {name: array[i] for name, array in columns.items()}
            try:
                found = self.inputs.image_columns(rows["data"][i], crop_of(self.fetch, epoch, rows["key"][i]), target)
            except ValueError as error:
                rows["problem"][i] = Problem(rows["key"][i], rows["shard"][i], "train", str(error)).row()
                continue
            if not columns:  # of regions the shapes are known from the first image that can be read
                columns = {name: np.empty((len(rows["key"]), *value.shape), value.dtype) for name, value in found.items()}
            for name, value in found.items():
                if value is not target.get(name):  # else it was decoded right into its place
                    columns[name][i] = value
        return columns

    def _words(self, rows: Columns) -> Columns:
        """tokens (N, max_length) int64 and token_mask (N, max_length) bool; zero and False in the rows of problems."""
        shape = len(rows["key"]), self.inputs.tokenizer.max_length
        tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for group, captions in self._tokenised(rows):
            width = captions.tokens.shape[1]
            tokens[group, :width], mask[group, :width] = captions.tokens.numpy(), captions.mask.numpy()
        return {"tokens": tokens, "token_mask": mask}

    def _tokenised(self, rows: Columns) -> list[tuple[list[int], Captions]]:
        """Row numbers with their token ids: all good rows in one call, or, where one of their captions cannot be tokenised, each in a
        call of its own, and that row becomes a problem."""
        good = [i for i, problem in enumerate(rows["problem"]) if problem is None]
        if not good:
            return []
        try:
            return [(good, self.inputs.captions([rows["text"][i] for i in good]))]
        except ValueError:
            pass
        done: list[tuple[list[int], Captions]] = []
        for i in good:
            try:
                done.append(([i], self.inputs.captions([rows["text"][i]])))
            except ValueError as error:
                rows["problem"][i] = Problem(rows["key"][i], rows["shard"][i], "train", str(error), "caption").row()
        return done


def _payloads(prepare: Payload, rows: Columns, modality: str) -> list[bytes]:
    """What a teacher is given of each row, empty in the rows of problems. Of rows of one sample the first is prepared."""
    found: dict[tuple[str, str, str], bytes | str] = {}
    payloads = [b""] * len(rows["key"])
    for i, (shard, key, caption) in enumerate(zip(rows["shard"], rows["key"], rows["caption"], strict=True)):
        if rows["problem"][i] is not None:
            continue
        place = (shard, key, caption if modality == "text" else "")
        if place not in found:
            found[place] = _payload(prepare, rows, i, modality)
        payload = found[place]
        if isinstance(payload, bytes):
            payloads[i] = payload
        else:
            rows["problem"][i] = Problem(key, shard, "teach", f"no {modality} teacher vector: {payload}").row()
    return payloads


def _payload(prepare: Payload, rows: Columns, row: int, modality: str) -> bytes | str:
    """What a teacher is given of a row, or why there is nothing to give."""
    try:
        if modality == "image":
            return prepare(parse_range(rows["sample"][row], rows["shard"][row], 0))
        return prepare(Caption(rows["caption"][row], rows["text"][row], json.loads(rows["caption_meta"][row])))
    except ValueError as error:
        return str(error)


def crop_of(fetch: Fetch, epoch: int, key: str) -> Draw:
    """The numbers of an image's crop: its own, or those of the view that its teacher vector is of."""
    store = fetch.stores.get("image")
    if store is None or store.crops is None:
        return draw(fetch.plan.seed, epoch, key)
    return draw(store.crops, epoch % store.views, key)


def _take(values: np.ndarray | list[object], rows: np.ndarray) -> np.ndarray | list[object]:
    return values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]
