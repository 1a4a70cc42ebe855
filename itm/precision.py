"""What the names of number formats mean, in one place, and what they cost here.

    fp32    IEEE float32 everywhere: products, cuDNN's convolutions and recurrent layers; the score of record
    tf32    float32 whose products, convolutions and recurrent layers may round their operands to 10 bits (GPUs since Ampere)
    bf16    autocast: products, convolutions and recurrent layers in bfloat16; norms, softmax, sums and losses in float32
    fp16    as bf16 in float16; training scales its losses (GradScaler), since small gradients would vanish
    auto    bf16 on a GPU, fp32 elsewhere

Long sums inside a bf16 or fp16 product are always kept in float32: cuBLAS may else split one and add its parts in the short format.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(name: str, device: torch.device) -> str:
    """One of PRECISIONS. Raises ValueError for an unknown name, and for bf16 on a GPU that has none."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}, auto")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"precision bf16: {torch.cuda.get_device_name(device)} has no bfloat16; use fp16 or fp32")
    return name


@contextlib.contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, a forward pass without gradient runs in `precision`, as the table above says; the flags are put back afterwards.

    Raises ValueError as `resolve_precision`.
    """
    with products(precision := resolve_precision(precision, device)), lowered(precision, device):
        yield


def lowered(precision: str, device: torch.device) -> torch.autocast:
    """Autocast of bf16 and fp16, for a forward pass; the backward pass follows by itself and stays outside."""
    return torch.autocast(device.type, LOW.get(precision), enabled=precision in LOW)


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Inside, what products, convolutions and recurrent layers may round; flags of the process, forward and backward."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (
        torch.get_float32_matmul_precision(),
        cudnn.allow_tf32,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )
    tf32 = precision == "tf32"
    _set_products("high" if tf32 else "highest", tf32, False, False)
    try:
        yield
    finally:
        _set_products(*before)


def _set_products(float32: str, cudnn_tf32: bool, bf16_sums: bool, fp16_sums: bool) -> None:
    torch.set_float32_matmul_precision(float32)
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = bf16_sums
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = fp16_sums


@contextlib.contextmanager
def repeatable(on: bool) -> Iterator[None]:
    """Inside, where `on`, only operators whose results are the same bits each time.

    Raises ValueError naming an operator that has no such form on this device.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it first multiplies
    before, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # for finding bugs, at the price of a pass
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ValueError(f"train.deterministic=true: {str(error).splitlines()[0]}; set it to false, or choose another part") from error
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


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
