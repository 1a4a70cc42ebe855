"""Planning, manifests and resumption at 10 to 10,000 shards: time grows no faster than the shards, memory with one window."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

from itm.data.manifest import Manifest, ShardInfo, check_present, write_manifest
from itm.data.plan import Plan, Position
from itm.data.shards import read_manifest

SIZES = (10, 100, 1_000, 10_000)
CAPTIONS = 1_250  # a shard of 250 images


def manifest(shards: int) -> Manifest:
    infos = [ShardInfo(name=f"{n:05d}.tar", samples=250, captions=CAPTIONS, bytes=0, sha256=f"{n:064x}") for n in range(shards)]
    return Manifest(split="train", source="made up", shards=infos)


def measured(folder: Path, shards: int) -> dict[str, float]:
    """CPU seconds of each part, and the bytes that planning takes at its peak."""
    folder.mkdir()
    for n in range(shards):
        (folder / f"{n:05d}.tar").touch()
    found: dict[str, float] = {}

    def lap(name: str, begin: float) -> float:
        found[name] = time.process_time() - begin
        return time.process_time()

    write_manifest(str(folder), manifest(shards))
    begin = time.process_time()
    read = read_manifest(str(folder))
    begin = lap("manifest", begin)
    check_present(str(folder), read)
    begin = lap("check", begin)
    plan = Plan.of(read, seed=0, batch=128, ranks=4, window=8)
    for step in range(20):
        plan.batch_pairs(step, 0, step % 4)
    begin = lap("plan", begin)
    position = plan.locate(plan.steps_per_epoch // 2)
    wider = Plan.of(read, seed=0, batch=128, ranks=8, window=8).resume(position)
    wider.check_digest(position, plan.digest(position), "checkpoint")
    wider.batch_pairs(position.step, 0, 7)
    lap("resume", begin)
    tracemalloc.start()
    plan.resume(Position(0, 1, 0)).batch_pairs(0, 0, 0)  # an epoch that no cache holds
    found["bytes"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_time_is_linear_in_the_shards_and_memory_is_that_of_a_window(tmp_path: Path) -> None:
    rows = {shards: measured(tmp_path / str(shards), shards) for shards in SIZES}
    for shards, row in rows.items():
        print(f"{shards:>6} shards {shards * CAPTIONS:>12,} pairs  " + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    for name in ("manifest", "check", "plan", "resume"):
        assert rows[10_000][name] < 10 * 3 * max(rows[1_000][name], 0.02), f"{name} grows faster than the shards"
    window = 8 * CAPTIONS * 2 * 8  # pairs of two int64
    for shards, row in rows.items():
        assert row["bytes"] < 6 * window + 200 * shards, f"planning {shards} shards takes {row['bytes']:,.0f} bytes"
