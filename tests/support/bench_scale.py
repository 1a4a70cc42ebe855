"""What a split costs by its number of shards, before a pair of it is read: `python -m tests.support.bench_scale 1000 10000 100000`.

Only manifests are made (10,000 captions a shard), so that a billion pairs fit on a laptop. One JSON line a size; docs/results/scale.md says
what the columns mean. Each size runs in a process of its own, whose peak memory is its own.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = (1_000, 10_000, 100_000)
CAPTIONS, SAMPLES, BYTES = 10_000, 2_000, 200 << 20  # of a shard
BATCH, RANKS, STEPS = 512, 8, 200


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, which do not count what else the machine does, and what the work gave."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def peak(afresh: bool = False) -> float:
    """MB this process has held at most, since the last call with afresh=True."""
    if afresh:
        Path("/proc/self/clear_refs").write_text("5")
    said = Path("/proc/self/status").read_text()
    return int(said.split("VmHWM:")[1].split()[0]) / 1024


def made_up(shards: int) -> Any:
    """A manifest of shards that are not there."""
    from itm.data.manifest import Manifest, ShardInfo

    infos = [ShardInfo(name=f"{n:06d}.tar", samples=SAMPLES, captions=CAPTIONS, bytes=BYTES, sha256=f"{n:064x}") for n in range(shards)]
    return Manifest(split="train", source="bench", shards=infos)


def measure(shards: int) -> dict[str, float]:
    """Seconds and MB of each thing that is done once a run, once an epoch, once a step, or at a resumption."""
    from itm.data.manifest import parse_manifest, write_manifest
    from itm.data.plan import Plan, Position
    from pipelines.on_ray.stream import work_of

    before = peak(afresh=True)
    manifest = made_up(shards)
    with tempfile.TemporaryDirectory() as folder:
        written, _ = timed(lambda: write_manifest(folder, manifest))
        data = (Path(folder) / "manifest.json").read_bytes()
    parsed, manifest = timed(lambda: parse_manifest("manifest.json", data))
    hashed, _ = timed(manifest.fingerprint)
    planned, plan = timed(lambda: Plan.of(manifest, seed=0, batch=BATCH, ranks=RANKS))
    first, _ = timed(lambda: plan.batch_pairs(0, 0, 0))
    steps, _ = timed(lambda: [plan.batch_pairs(step, 0, 0) for step in range(1, 1 + STEPS)])
    located, _ = timed(lambda: [plan.locate(step) for step in range(STEPS)])
    middle = Position(1234, 3, plan.pairs // 2)
    resumed, _ = timed(lambda: plan.resume(middle).batch_pairs(1234, 0, 0))
    digested, _ = timed(lambda: plan.digest(middle))
    listed, work = timed(lambda: work_of(0, 0, plan.steps_per_epoch, 1))
    sent, packet = timed(lambda: pickle.dumps((manifest, plan)))
    return {
        "shards": shards,
        "pairs": manifest.captions,
        "manifest_mb": len(data) / 1e6,
        "write_s": written,
        "parse_s": parsed,
        "fingerprint_s": hashed,
        "plan_s": planned,
        "first_batch_s": first,
        "batch_ms": 1000 * steps / STEPS,
        "locate_ms": 1000 * located / STEPS,
        "resume_s": resumed,
        "digest_s": digested,
        "work_s": listed,
        "work_items": len(work),
        "packet_mb": len(packet) / 1e6,
        "packet_s": sent,
        "peak_mb": peak() - before,
    }


def warmed(shards: int) -> dict[str, float]:
    """Measured after a small round, in which what is made once a process is made."""
    measure(10)
    return measure(shards)


def main(arguments: list[str]) -> None:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for shards in map(int, arguments or map(str, SIZES)):
            found = pool.apply(warmed, (shards,))
            print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
