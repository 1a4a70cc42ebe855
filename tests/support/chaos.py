"""Chaos: stages killed with SIGKILL at random moments and run again until they are done; the end must be a quiet run's, byte for byte.

python -m tests.support.chaos                      # pack, teach, train, evaluate; at least 20 kills
python -m tests.support.chaos --kills 3 --seed 7   # the same kills are drawn for the same seed; where they fall depends on the machine
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from safetensors.torch import load_file

from itm.config import Recipe, parse_recipe
from itm.data.shards import read_manifest
from itm.data.sidecar import read_sidecar

STAGES = ("pack", "teach", "train", "evaluate")
DEADLINE = 300.0  # seconds a stage may take without being killed
SEED, KILLS = 0, 20


def recipe(root: Path, workers: int = 0) -> Recipe:
    """Scenes in small shards, so that every stage has many moments to die in."""
    image, text = {"kind": "conv", "image_size": 16, "hidden": 16}, {"kind": "pooled_gru", "word_dim": 8, "hidden": 8}
    source = {"kind": "scenes", "options": {"world": "tiny", "n_train": 120, "n_val": 8, "n_test": 8}}
    return parse_recipe(
        {
            "name": "run",
            "output": f"{root}/runs",
            "data": {"root": f"{root}/shards", "source": source, "shard_samples": 4, "image_size": 16, "crop": "random"},
            "text": {"max_length": 10},
            "teachers": {"image": {"kind": "statistics"}, "text": {"kind": "scenes_text", "options": {"world": "tiny"}}},
            "model": {"kind": "dual", "options": {"image": image, "text": text, "width": 8}},
            "method": {"kind": "cusa"},
            "train": {"batch_size": 20, "steps": 60, "workers": workers, "validate_every": 20, "checkpoint_every": 3, "log_every": 1},
        }
    )


def start(stage: str, choices: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{choices.parent}/mlflow.db", "RAY_raylet_start_wait_time_s": "240"}
    command = [sys.executable, "-m", f"pipelines.{stage}", "-c", str(choices)]
    with (choices.parent / f"{stage}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a driver and what it started, by their ids, as a machine that loses its power does."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def survive(stage: str, choices: Path, chance: random.Random, kills: int, usual: float) -> int:
    """Run a stage to its end, killing it up to `kills` times within its usual time; how often it was killed."""
    killed = 0
    while True:
        process = start(stage, choices)
        patience = chance.uniform(0.1, 1.0) * usual if killed < kills else DEADLINE
        try:
            code = process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            kill(process)
            if killed == kills:
                raise TimeoutError(f"{stage} did not end within {DEADLINE:.0f} s") from None
            killed += 1
            print(f"{stage}: killed after {patience:.1f} s ({killed})", flush=True)
            continue
        if code:
            raise RuntimeError(f"{stage} ended with {code}: {(choices.parent / f'{stage}.log').read_text()[-2000:]}")
        return killed  # perhaps before all blows fell: what is finished cannot be killed any more


def prepared(root: Path, workers: int) -> Path:
    root.mkdir(parents=True)
    path = root / "recipe.json"
    path.write_text(recipe(root, workers).model_dump_json())
    return path


def result(root: Path) -> dict[str, bytes]:
    """The bytes of everything that must be equal: shards, indexes, manifests, sidecars, stores, and the trained weights."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_file() and (name.startswith("shards/") or name.endswith(".safetensors")):
            found[name] = path.read_bytes()
    return found


def whole(root: Path) -> None:
    """What is there can be read, and nothing half-written is left."""
    assert read_manifest(str(root / "shards/train")).samples == 120
    for path in root.rglob("*.arrow"):
        read_sidecar(str(path))
    assert load_file(root / "runs/run/matcher/model.safetensors")
    left = [str(path) for path in root.rglob("*") if ".tmp-" in path.name]
    assert not left, left


def chaos(folder: Path, seed: int, kills: int, workers: int = 0) -> int:
    """Kill until `kills` blows have fallen; returns how many did. Raises AssertionError when an end differs from the quiet one."""
    quiet = prepared(folder / "quiet", workers)
    usual: dict[str, float] = {}
    for stage in STAGES:
        begin = time.monotonic()
        survive(stage, quiet, random.Random(0), 0, 1.0)
        usual[stage] = time.monotonic() - begin
    whole(quiet.parent)
    expected, chance = result(quiet.parent), random.Random(seed)
    fallen, round_number = 0, 0
    while fallen < kills:
        round_number += 1
        place = prepared(folder / f"round-{round_number}", workers)
        blows = Counter(chance.choices(STAGES, k=kills - fallen))
        for stage in STAGES:
            fallen += survive(stage, place, chance, blows[stage], usual[stage])
        whole(place.parent)
        found = result(place.parent)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        different = [name for name in expected if found[name] != expected[name]]
        assert not different, different
        print(f"round {round_number}: {fallen} kills so far, {len(found)} files equal to the quiet run's", flush=True)
    return fallen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, default=0, help="Ray Train workers of the training; 0 = inside the driver")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="itm-chaos-") as scratch:
        print(f"{chaos(Path(scratch), args.seed, args.kills, args.workers)} kills survived")
