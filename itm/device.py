"""Where things are computed, and the error for a device that is not there. The one place that asks whether there is a GPU."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CACHE = "TORCHINDUCTOR_CACHE_DIR"
CGROUP = Path("/sys/fs/cgroup")
HELP = "auto (a GPU where there is one), cpu, cuda, cuda:1, or any other device of torch (default: auto)"


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """`auto` is CUDA where there is CUDA, else the CPU; every other name is torch's own (`cpu`, `cuda`, `cuda:1`, `mps`, ...).

    Raises ValueError for a name that torch does not know, and for CUDA, or a number of it, that is not there.
    """
    import torch  # here: a command line that shows its options does not wait for it

    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {str(name)!r} is unknown: use auto, cpu, cuda or cuda:0 ({str(error).splitlines()[0]})") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        built = "torch sees no NVIDIA GPU here" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        raise ValueError(f"device {str(name)!r} was asked for, but {built}: use auto or cpu, or another machine")
    if device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise ValueError(f"device {str(name)!r} was asked for, but there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    return device


def is_lost(error: BaseException) -> bool:
    """Whether this process can't use its device any more: after a fault of a kernel or of the hardware every call fails as that one did.

    A device that is only full is not lost.
    """
    import torch

    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error:" in str(error))


def cores() -> int:
    """CPU cores that this process may use: of the machine, of its affinity, and of its container's limit, which the others do not show."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or `max`: no limit
        quota, period = (CGROUP / "cpu.max").read_text().split()
        there = min(there, int(quota) // int(period))
    return max(1, there)


def keep_kernels_apart() -> None:
    """To be called before torch.compile: the kernels that it keeps on disk get a folder for each set of CPU instructions.

    The cache does not ask for which set a kernel was made. One made for AVX-512 gives wrong numbers where a machine that shares the folder,
    or a setting such as ATEN_CPU_CAPABILITY, has AVX2 only. A TORCHINDUCTOR_CACHE_DIR of the user's own stays.
    """
    import torch

    usual = str(Path(tempfile.gettempdir()) / f"torchinductor_{re.sub(r'[^A-Za-z0-9_-]', '_', getpass.getuser())}")
    if (os.environ.get(CACHE) or usual).startswith(usual):  # unset, torch's own choice, or ours from a process with another set
        os.environ[CACHE] = f"{usual}_{torch.backends.cpu.get_cpu_capability()}"


def send(x: Tensor, device: torch.device) -> Tensor:
    """A small tensor of main memory on `device`; a GPU fetches it by itself, and the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


@contextlib.contextmanager
def sized_by(setting: str, value: int, otherwise: str = "") -> Iterator[None]:
    """Inside, a device that is out of memory raises ValueError naming the setting, a value to try, and what else would help."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).splitlines()[0]
        lower = f"try {setting}={value // 2}" if value > 1 else f"{setting} can't be lower"
        raise ValueError(f"out of memory with {setting}={value}: {lower}{otherwise} ({said})") from error
