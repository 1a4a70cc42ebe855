"""Small parts of every other kind."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from itm.data.records import Caption, Problem, Record
from itm.data.sources.source import Source
from itm.matchers.dual import DualEncoder
from itm.matchers.encoders.poolings import Pooling
from itm.matchers.encoders.towers import PooledGRU
from itm.methods.matching import Matching
from itm.methods.terms import Term
from itm.tracking.loggers import Logger


class Vectors(DualEncoder):
    """A matcher that differs in nothing but its name."""


class Reader(PooledGRU):
    """A text encoder that differs in nothing but its name."""


class Largest(Pooling):
    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        return parts.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1)


class Squared(Term):
    """The squared distance of scores to 1 for positive pairs and to 0 for others."""

    def forward(self, scores: Tensor, positives: Tensor, step: int) -> Tensor:
        return (scores - positives.to(scores.dtype)).square().mean()


class Training(Matching):
    """A method that differs in nothing but its name."""


class Lines(Source):
    """A text file of captions; the picture of each is a square of its own grey."""

    def __init__(self, path: str) -> None:
        self.rows, self.splits = Path(path).read_text().splitlines(), ["train"]

    def count(self, split: str) -> int:
        return len(self.rows)

    def item(self, split: str, index: int) -> Record | Problem:
        buffer = io.BytesIO()
        Image.new("RGB", (24, 24), (index % 256,) * 3).save(buffer, "PNG")
        return Record(f"line{index}", split, [Caption(f"line{index}.0", self.rows[index])], buffer.getvalue(), "png")

    def identity(self) -> dict[str, Any]:
        return {"source": "Lines", "rows": self.rows}


class JsonLines(Logger):
    """Appends what it is told to a file."""

    def __init__(self, *, path: str, **run: str) -> None:
        super().__init__(**run)
        self.path = Path(path)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"name": self.name, "run": self.run_id, "step": step, **values}) + "\n")


class Other(nn.Module):
    """A module that is no part of any kind."""
