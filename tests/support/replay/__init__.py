"""Replay of golden cases: finds them by their files, runs our code on their inputs, compares with their outputs.

Each family module offers `find(root: Path) -> Iterator[Case]`. A case yields `Check`s when run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Check:
    """One array compared: passes when |got - want| <= atol + rtol * max|want| everywhere and shapes agree."""

    name: str
    got: Any
    want: Any
    atol: float = 1e-5
    rtol: float = 1e-5

    def differences(self) -> tuple[float, float, bool]:
        """(largest absolute, the same relative to max|want|, passed). NaN equals NaN."""
        got, want = np.asarray(self.got), np.asarray(self.want)
        if got.shape != want.shape:
            return float("inf"), float("inf"), False
        if want.size == 0:
            return 0.0, 0.0, True
        if not np.issubdtype(want.dtype, np.number):
            same = bool(np.array_equal(got, want))
            return (0.0, 0.0, True) if same else (float("inf"), float("inf"), False)
        got, want = got.astype(np.float64), want.astype(np.float64)
        equal = (got == want) | (np.isnan(got) & np.isnan(want))
        diff = np.where(equal, 0.0, np.abs(got - want))
        finite = np.abs(want[np.isfinite(want)])
        scale = float(finite.max()) if finite.size else 0.0
        worst = float(np.nan_to_num(diff, nan=np.inf).max())
        return worst, worst / scale if scale else worst, worst <= self.atol + self.rtol * scale


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], Iterator[Check]]
