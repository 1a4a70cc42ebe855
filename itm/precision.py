"""What the names of number formats cost here: whether bfloat16 is worth asking for on this CPU."""

from __future__ import annotations

import functools
import time
import warnings

import torch
from torch import Tensor


@functools.cache
def bf16_cost() -> float:
    """Time of a bfloat16 product over that of the same float32 product on this CPU: the least of seven tries of each, in turn."""
    wide = torch.randn(256, 1024)
    narrow = wide.to(torch.bfloat16)
    times = [(_seconds(narrow), _seconds(wide)) for _ in range(7)]
    return min(low for low, _ in times) / min(full for _, full in times)


def _seconds(rows: Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        torch.nn.functional.linear(rows, rows)
    return time.perf_counter() - start


def warn_if_slow(precision: str, device: torch.device) -> None:
    """Warn, once a place, where `precision` is bf16 and slower than fp32 on a CPU: it would cost exactness and time."""
    if precision == "bf16" and device.type == "cpu" and (cost := bf16_cost()) > 1.1:
        warnings.warn(f"bf16 is slower than fp32 on this CPU ({cost:.1f} x the time of a product): use fp32", stacklevel=3)
