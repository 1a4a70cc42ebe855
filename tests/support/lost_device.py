"""A method of one's own whose device is lost in its fifth step, the first time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itm.methods.matching import Matching
from itm.types import Batch, Matcher

STEP = 5


class LosesItsDevice(Matching):
    def __init__(self, matcher: Matcher, *, notes: str, **options: Any) -> None:
        """notes: a file that gets a line with the process and the number of each step; options: as `Matching`."""
        super().__init__(matcher, **options)
        self.notes = Path(notes)

    def forward(self, batch: Batch, step: int = 0, chunk: int | None = None) -> dict[str, Tensor]:
        before = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.write_text("".join(line + "\n" for line in (*before, f"{os.getpid()} {step}")))
        if step == STEP and not any(line.endswith(f" {STEP}") for line in before):
            raise torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`")
        return super().forward(batch, step, chunk)
