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
from tests.support.lab.cluster import Lab, lab, lab_recipe
from tests.support.lab.machines import asked_for, missing
from tests.support.s3_server import BUCKET

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(why := missing() or asked_for()), reason=f"NOT TESTED: nodes that feed trainers; {why}"),
]
STEPS = 120


def photos(split: str, count: int) -> None:
    """Written past the cluster. A photo of 4.6 megapixels keeps a thread busy for longer than the small model its step."""
    records = []
    for number in range(count):
        out, noise = io.BytesIO(), np.random.default_rng(number).integers(0, 256, (80, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((2400, 1920)).save(out, "JPEG")
        records.append(Record(f"k{number}", split, [Caption(f"c{number}", f"a thing of kind {number % 7}")], out.getvalue(), "jpg"))
    size = len(records) // 4
    infos = [write_shard(f"s3://{BUCKET}/shards/{split}/{n:05}.tar", records[n * size : (n + 1) * size]) for n in range(4)]
    write_manifest(f"s3://{BUCKET}/shards/{split}", Manifest(split=split, source="photos made-up", shards=infos))


def training(there: Lab, name: str, decode: str, lose: int | None = None) -> dict[str, Any]:
    """lose: a worker that loses its power when actors have taken over. Returns the log, the last weights and state, and traffic."""
    log, before = there.folder / f"{name}.log", [worker.traffic() for worker in there.workers]
    job = there.start("train", f"name={name}", f"data.decode={decode}", log=log)
    end = time.monotonic() + 900
    while job.poll() is None:
        assert time.monotonic() < end, log.read_text()[-3000:]
        if lose is not None and "actors a trainer decode on" in log.read_text():
            there.workers[lose].lose()
            lose = None
        time.sleep(0.5)
    said = log.read_text()
    assert job.returncode == 0, said[-3000:]
    after = [worker.traffic() if worker.alive else start for worker, start in zip(there.workers, before, strict=True)]
    state, weights = (there.objects(f"runs/{name}/checkpoints")[f"runs/{name}/checkpoints/{STEPS:09}.{kind}"] for kind in KINDS)
    moved = [(one[0] - start[0], one[1] - start[1]) for one, start in zip(after, before, strict=True)]
    return {"said": said, "state": json.loads(state), "weights": weights, "moved": moved}


KINDS = ("json", "model.safetensors")


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table in docs/clusters.md."""
    waiting, speed = re.findall(r"([\d,]+) pairs/s, (\d+%) waiting", found["said"])[-1][::-1]
    into = sum(received for received, _ in found["moved"][:2]) / 1e6
    out = sum(sent for _, sent in found["moved"][2:]) / 1e6
    return f"{name}: {speed} pairs/s, {waiting} waiting, {into:.0f} MB into the trainers' nodes, {out:.0f} MB out of the feeding ones"


def test_nodes_without_trainers_decode_for_those_with_slow_threads_and_may_die(tmp_path: Path) -> None:
    with lab(tmp_path, feeders=2) as there:
        given = {"train__steps": STEPS, "train__validate_every": STEPS, "train__log_every": 20}
        there.write_recipe(lab_recipe(method={"kind": "matching"}, data__exact_pixels=True, **given))
        photos("train", 40)
        photos("val", 8)
        own = training(there, "own", "trainer")
        fed = training(there, "fed", "auto")
        lost = training(there, "lost", "auto", lose=3)
        for name, found in (("own", own), ("fed", fed), ("lost", lost)):
            print(line(name, found), flush=True)
    addresses = ", ".join(worker.address for worker in there.workers[2:])
    assert f"actors a trainer decode on {addresses}" in fed["said"], fed["said"][-3000:]
    assert sum(sent for _, sent in fed["moved"][2:]) > 2 * sum(sent for _, sent in own["moved"][2:]), "nothing came from the feeding nodes"
    for found in (fed, lost):
        assert found["state"]["digest"] == own["state"]["digest"]
        assert found["weights"] == own["weights"], "the same pairs at each step give the same weights"
