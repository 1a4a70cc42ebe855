"""Two nodes that only decode feed two trainers whose own threads are too slow; one of them dies, and not one bit is lost."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from itm.data.manifest import Manifest, write_manifest
from itm.data.records import Caption, Record
from itm.data.shards import write_shard
from pipelines.on_ray.feeding import HANDOVER, PROBE, WARM
from tests.support.lab.cluster import Lab, lab, lab_recipe
from tests.support.lab.machines import asked_for, missing
from tests.support.s3_server import BUCKET

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(why := missing() or asked_for()), reason=f"NOT TESTED: nodes that feed trainers; {why}"),
]
STEPS, BATCH, FED = 64, 16, WARM + PROBE + HANDOVER
"""From step FED on others decode for the trainers."""
SIZE = (2400, 1920)
"""16 photos of 4.6 megapixels keep a thread busy for ten times as long as a step of the small model takes, on any machine."""
KINDS = ("json", "model.safetensors")


def photos(split: str, count: int) -> int:
    """Written past the cluster; the bytes of all of them. Smooth ones: much to decode, little to send."""
    records = []
    for number in range(count):
        out, noise = io.BytesIO(), np.random.default_rng(number).integers(0, 256, (20, 25, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(SIZE).save(out, "JPEG", quality=50)
        records.append(Record(f"k{number}", split, [Caption(f"c{number}", f"a thing of kind {number % 7}")], out.getvalue(), "jpg"))
    size = len(records) // 4
    infos = [write_shard(f"s3://{BUCKET}/shards/{split}/{n:05}.tar", records[n * size : (n + 1) * size]) for n in range(4)]
    write_manifest(f"s3://{BUCKET}/shards/{split}", Manifest(split=split, source="photos made-up", shards=infos))
    return sum(len(record.image) for record in records if record.image)


def training(there: Lab, name: str, decode: str, lose: int | None = None) -> dict[str, Any]:
    """lose: a worker that loses its power when actors have decoded for a while.

    Returns the log, the last weights and state, the traffic of each worker, and on which of them there were actors that decode.
    """
    log, before, decoders = there.folder / f"{name}.log", [worker.traffic() for worker in there.workers], set[int]()
    job = there.start("train", f"name={name}", f"data.decode={decode}", log=log)
    end = time.monotonic() + 900
    while job.poll() is None:
        assert time.monotonic() < end, log.read_text()[-3000:]
        decoders |= {n for n, worker in enumerate(there.workers) if worker.alive and worker.processes("PrepareActor")}
        if lose is not None and step_of(log.read_text()) > FED:
            there.workers[lose].lose()
            lose = None
        time.sleep(1)
    said = log.read_text()
    assert job.returncode == 0, said[-3000:]
    assert lose is None, f"the training ended before a node was lost: {said[-3000:]}"
    after = [worker.traffic() if worker.alive else None for worker in there.workers]
    kept = there.objects(f"runs/{name}/checkpoints")
    state, weights = (kept[f"runs/{name}/checkpoints/{STEPS:09}.{kind}"] for kind in KINDS)
    moved = [(now[0] - start[0], now[1] - start[1]) if now else (0, 0) for now, start in zip(after, before, strict=True)]
    return {"said": said, "state": json.loads(state), "weights": weights, "moved": moved, "decoders": decoders}


def step_of(log: str) -> int:
    """The last step that a training has told of."""
    return int((re.findall(rf"(\d+) of {STEPS} steps", log) or [0])[-1])


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table in docs/clusters.md: of the last steps, and of the traffic of those nodes that are left."""
    _, waiting = re.findall(r"([\d,]+) pairs/s, (\d+%) waiting", found["said"])[-1]
    megabytes = [f"{sum(pair[way] for pair in nodes) / 1e6:.1f}" for nodes in (found["moved"][:2], found["moved"][2:]) for way in (0, 1)]
    return f"| {name} | {' | '.join(megabytes)} | {waiting} |"


def test_nodes_without_trainers_decode_for_those_with_slow_threads_and_may_die(tmp_path: Path) -> None:
    with lab(tmp_path, feeders=2) as there:
        given = {"train__steps": STEPS, "train__validate_every": STEPS, "train__checkpoint_every": STEPS, "train__log_every": 4}
        there.write_recipe(lab_recipe(method={"kind": "matching"}, train__batch_size=BATCH, data__exact_pixels=True, **given))
        held = photos("train", 80)
        photos("val", 8)
        print(f"{STEPS * 2 * BATCH} pairs of {held / 80 / 1000:.0f} kB", flush=True)
        found = {}
        for name, decode, lose in (("own", "trainer", None), ("fed", "auto", None), ("lost", "auto", 3)):
            found[name] = training(there, name, decode, lose)
            print(line(name, found[name]), flush=True)
    addresses = ", ".join(worker.address for worker in there.workers[2:])
    assert [found[name]["decoders"] for name in found] == [set(), {2, 3}, {2, 3}], "nodes with actors that decode"
    for name in ("fed", "lost"):
        assert f"actors a trainer decode on {addresses}" in found[name]["said"], found[name]["said"][-3000:]
        assert found[name]["state"]["digest"] == found["own"]["state"]["digest"]
        assert found[name]["weights"] == found["own"]["weights"], "the same pairs at each step give the same weights"
