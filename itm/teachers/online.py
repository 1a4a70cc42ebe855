"""Teachers that run in a training step, beside the model, instead of being read from a store: the same targets, up to its rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from itm.config import Part, Teachers
from itm.data import files
from itm.data.arrow import Columns
from itm.data.sidecar import teacher_id
from itm.teachers.identity import Modality, build_teacher, embed_in_batches
from itm.types import Batch, SoftLabels

PLACES = ("path", "uri")
"""Options of teachers that name a file or a folder."""


@dataclass(frozen=True)
class Online:
    """A teacher as workers build it, which have another working directory: places that are there are absolute. teacher: its id."""

    part: Part
    modality: Modality
    teacher: str

    @classmethod
    def of(cls, teachers: Teachers, modality: Modality) -> Online:
        """Builds the teacher once, for its id. Raises ValueError as `build_teacher`, and where one of several views is to be read."""
        if modality == "image" and teachers.views == "one":
            raise ValueError("teachers.views=one reads the views of a store: take image out of teachers.online, or read the mean")
        part: Part = getattr(teachers, modality)
        part = part.model_copy(update={"options": {name: _found(name, value) for name, value in part.options.items()}})
        return cls(part, modality, teacher_id(build_teacher(part, modality).identity))


def _found(name: str, value: Any) -> Any:
    if name not in PLACES or not isinstance(value, str | list):
        return value
    return [_found(name, one) for one in value] if isinstance(value, list) else files.absolute(value) if files.exists(value) else value


class OnlineTeachers:
    """The teachers of one training worker: frozen, in evaluation mode, on its device. There may be none.

    They are no part of the method that is trained: they have no gradient, are kept in no checkpoint and are shared over no ranks.
    """

    def __init__(self, online: Mapping[Modality, Online], batch_size: int, device: torch.device) -> None:
        """batch_size: rows per call of a teacher. Raises ValueError where a teacher has other weights here than in the driver."""
        self.batch_size = batch_size
        self.teachers = {one.modality: build_teacher(one.part, one.modality).to(device) for one in online.values()}
        for modality, teacher in self.teachers.items():
            if teacher_id(teacher.identity) != online[modality].teacher:
                raise ValueError(f"teachers.{modality} has other weights here than on the driver's node: give every node the same")
            if teacher.module is not None:
                teacher.module.eval().requires_grad_(False)

    @property
    def prepare(self) -> dict[str, Callable[[Any], bytes]]:
        """By modality, what turns a row into what `taught` reads; light, and without the model."""
        return {modality: teacher.prepare for modality, teacher in self.teachers.items()}

    def taught(self, batch: Batch, columns: Columns) -> Batch:
        """The batch with their vectors (B, D) float32, in main memory as stored ones are.

        columns: online_image and online_text, what `prepare` made of each row. Raises ValueError for a teacher that gives other widths.
        """
        if not self.teachers:
            return batch
        vectors = {
            str(modality): torch.from_numpy(
                _of_samples(embed_in_batches(teacher, columns[f"online_{modality}"], self.batch_size), teacher.views)
            )
            for modality, teacher in self.teachers.items()
        }
        return replace(batch, teacher=replace(batch.teacher or SoftLabels(), each=(), **vectors))


def _of_samples(vectors: np.ndarray, views: int) -> np.ndarray:
    """(B, D): of several views the mean of their unit vectors, as it is read from a store."""
    if views == 1:
        return vectors
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit.reshape(-1, views, vectors.shape[1]).mean(1)
