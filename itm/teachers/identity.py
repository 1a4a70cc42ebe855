"""What every teacher is: `prepare` one row (light, on any CPU), `embed` many (the model), and an identity that is data."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from itm.config import Part
from itm.data.formats import Json
from itm.data.records import Caption
from itm.data.shards import Sample
from itm.device import resolve_device, sized_by
from itm.kinds import build_part, find_part
from itm.precision import computing
from itm.teachers import TEACHERS

Modality = Literal["image", "text"]
Precision = Literal["fp32", "fp16", "bf16"]


class Teacher:
    """Rows -> vectors. A row is a `Sample` for an image teacher, a `Caption` for a text teacher.

    `prepare(row) -> bytes` decodes or cleans one row without the model; it is picklable, so it runs in other processes than
    the model, and raises ValueError for a row that cannot be scored. `embed(payloads) -> (N * views, D) float32` runs the model.
    `identity` is JSON-able and differs between any two teachers whose vectors may differ.
    """

    modality: Modality
    identity: Json
    width: int
    views: int = 1
    prepare: Callable[[Any], bytes]
    module: nn.Module | None = None
    device: torch.device = torch.device("cpu")

    def embed(self, payloads: Sequence[bytes]) -> np.ndarray:
        raise NotImplementedError

    def __call__(self, rows: Sequence[Sample | Caption]) -> np.ndarray:
        """(N * views, D) float32. Raises ValueError for a row that cannot be scored."""
        return self.embed([self.prepare(row) for row in rows])

    def to(self, device: str | torch.device) -> Teacher:
        """Raises ValueError for a device that is not there (`resolve_device`). A teacher without a model stays where it is."""
        if self.module is not None:
            self.device = resolve_device(device)
            self.module.to(self.device)
        return self


class VectorTeacher(Teacher):
    """A teacher whose `prepare` already gives the vector, as float32 bytes."""

    def embed(self, payloads: Sequence[bytes]) -> np.ndarray:
        return np.stack([np.frombuffer(p, np.float32) for p in payloads])


def build_teacher(part: Part, modality: Modality) -> Teacher:
    """Build a recipe's teacher for a modality. Raises ValueError for an unknown kind or option, or the other modality."""
    given = {"modality": modality} if "modality" in inspect.signature(find_part(TEACHERS, part.kind, "teacher")).parameters else {}
    teacher = build_part(TEACHERS, part.kind, part.options, "teacher", **given)
    assert isinstance(teacher, Teacher)  # the base of the table, which a table cannot import
    if teacher.modality != modality:
        raise ValueError(f"teachers.{modality}: {part.kind!r} is a teacher of {teacher.modality}s, not of {modality}s")
    return teacher


def choice_of(part: Part, modality: str, dtype: str) -> Json:
    """A recipe's choice of teacher, as a soft-label store is looked up by."""
    return {"modality": modality, "dtype": dtype, "kind": part.kind, "options": part.options}


def embed_in_batches(teacher: Teacher, payloads: Sequence[bytes], batch_size: int) -> np.ndarray:
    """(N * views, D) float32 in the order given. Batches are filled by length, so that a batch of captions is padded little."""
    order = sorted(range(len(payloads)), key=lambda row: len(payloads[row]))
    vectors = np.zeros((len(payloads), teacher.views, teacher.width), np.float32)
    with (
        sized_by("teachers.batch_size", batch_size),
        computing("fp32", teacher.device),
    ):  # what is stored is of record; a teacher in fp16 or bf16 says so in its weights
        _embed_rows(teacher, payloads, order, max(1, batch_size // teacher.views), vectors)
    return vectors.reshape(-1, teacher.width)


def _embed_rows(teacher: Teacher, payloads: Sequence[bytes], order: list[int], batch_size: int, vectors: np.ndarray) -> None:
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = teacher.embed([payloads[row] for row in rows])
        if batch.shape != (len(rows) * teacher.views, teacher.width):
            raise ValueError(f"teacher {teacher.identity['kind']!r} gave {batch.shape} for {len(rows)} rows of width {teacher.width}")
        vectors[rows] = batch.reshape(len(rows), teacher.views, teacher.width)


def json_sha256(value: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
