"""Where and when something was computed: date, machine, device and versions, as results and runs record them."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("itm-pipeline", "torch", "transformers", "ray", "numpy", "pyarrow", "pillow")


def environment() -> dict[str, Any]:
    """date (UTC, ISO 8601, seconds), machine, device (a GPU's name, or the CPU's instructions) and versions {package: version}."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": _machine(), "device": _device(), "versions": _versions()}


def _machine() -> str:
    cores = f"{os.cpu_count() or 1} cores"
    try:
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):  # a system that does not tell
        memory = ""
    return f"{platform.system()} {platform.machine()}, {cores}{memory}"


def _device() -> str:
    """Of this process; torch is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)})"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
