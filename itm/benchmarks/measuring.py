"""Random parts of the published size, and works that run in turns and are timed: what the measurements of `itm bench` share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.types import Encoded

REGIONS, WIDTH = 36, 1024


@dataclass(frozen=True)
class World:
    images: Encoded
    captions: Encoded
    ragged: list[Tensor]
    every: int


def world(images: int, captions: int, every: int, device: str) -> World:
    """Unit parts with a common mean; lengths 6 + Poisson(8.5), start and end included. Caption n describes image n mod `images`."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    common = 0.8 * random(1, 1, WIDTH)
    regions = F.normalize(random(images, REGIONS, WIDTH) + common, dim=-1)
    lengths = (6 + torch.poisson(torch.full((captions,), 8.5), generator=generator)).long().clamp(max=33)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    own = regions[torch.arange(captions) % images][:, torch.randint(0, REGIONS, (mask.shape[1],), generator=generator)]
    words = F.normalize(random(captions, mask.shape[1], WIDTH) + common + 32 * own, dim=-1) * mask[..., None]
    ragged = [row[:n].contiguous().to(device) for row, n in zip(words, lengths.tolist(), strict=True)]
    left = Encoded(parts=regions, mask=torch.ones(images, REGIONS, dtype=torch.bool))
    return World(left.to(device), Encoded(parts=words, mask=mask).to(device), ragged[::every], every)


def alternate(
    works: dict[str, Callable[[], Tensor]], rounds: int, device: str
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float], dict[str, Tensor]]:
    """(CPU, wall) seconds of every round, peak MB above the start, and the results, by name; one warm-up round, which is not timed."""
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    memory, results = {}, {}
    for turn in range(rounds + 1):
        for name, work in works.items():
            before = _peak(device, reset=True)
            _wait(device)
            cpu, wall = time.process_time(), time.perf_counter()
            results[name] = work()
            _wait(device)
            if turn:
                spans[name].append((time.process_time() - cpu, time.perf_counter() - wall))
            memory[name] = (_peak(device) - before) / 1e6
    return spans, memory, results


def _peak(device: str, reset: bool = False) -> float:
    """Largest memory in bytes since the last reset; a reset gives what is held now. 0 where the system does not tell."""
    if device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.max_memory_allocated())
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0.0)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
