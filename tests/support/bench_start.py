"""From the command to the first step: `itm train` on Ray and without it, against a bare Ray Train job, in turn.

python -m tests.support.bench_start --rounds 3
python -m tests.support.bench_start --beside ../before     # as well with the code of another checkout

The bare job imports ray and torch, starts a session as ours does and one worker of Ray Train, which says that it runs: no data, no model,
no tracking. CPU seconds are those of the whole process tree until then.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.support import ROOT
from tests.support.bench_data import Tree
from tests.support.small_training import recipe, splits

BARE = """
import sys, time
from pipelines.on_ray.session import STORE_BYTES, quiet
quiet()
import psutil, ray, torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def work(config):
    with open(config["log"], "a") as log:
        log.write(f"first step after {time.time() - config['began']:.1f} s: all\\n")

ray.init(address="local", num_cpus=4, object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False)
given = {"log": sys.argv[1], "began": psutil.Process().create_time()}
one, kept = ScalingConfig(num_workers=1), RunConfig(storage_path=sys.argv[2])
TorchTrainer(work, train_loop_config=given, scaling_config=one, run_config=kept).fit()
"""
FIRST = re.compile(r"first step after ([\d.]+) s: (.*)")
Found = tuple[float, float, str]
"""Seconds and CPU seconds to the first step, and the parts that were told."""


def started(command: list[str], code: Path, folder: Path) -> Found:
    """Run to the end; `out` of the folder is where the first step is told."""
    log = folder / "out"
    environment = {**os.environ, "PYTHONPATH": str(code), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=folder)
    tree, cpu = Tree(psutil.Process(process.pid)), 0.0
    while process.poll() is None:
        if not cpu and FIRST.search(log.read_text()):
            cpu = tree.cpu()
        time.sleep(0.2)
    tree.stop()
    said = FIRST.search(log.read_text())
    assert process.returncode == 0 and said, log.read_text()[-3000:]
    return float(said[1]), cpu, said[2]


def one(kind: str, code: Path) -> Found:
    with tempfile.TemporaryDirectory(prefix="itm-start-") as scratch:
        folder = Path(scratch)
        if kind == "bare":
            (folder / "bare.py").write_text(BARE)
            return started([sys.executable, "bare.py", str(folder / "out"), str(folder / "kept")], code, folder)
        splits(folder)
        (folder / "r.json").write_text(
            recipe(folder, workers=int(kind), steps=40, validate_every=40, checkpoint_every=40).model_dump_json()
        )
        return started([sys.executable, "-m", "pipelines.train", "-c", "r.json"], code, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="another checkout, whose trainings start in turn with ours")
    args = parser.parse_args()
    rows = {"bare Ray Train": ("bare", ROOT), "workers=1": ("1", ROOT), "workers=0": ("0", ROOT)}
    if args.beside:
        other = args.beside.resolve()
        rows |= {"workers=1, beside": ("1", other), "workers=0, beside": ("0", other)}
    found: dict[str, list[Found]] = {name: [] for name in rows}
    for _ in range(args.rounds):
        for name, (kind, code) in rows.items():
            found[name].append(one(kind, code))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    bare = statistics.median(seconds for seconds, _, _ in found["bare Ray Train"])
    print("| | first step after, s | x bare | CPU s | parts of the median |\n|---|---|---|---|---|")
    for name, runs in found.items():
        seconds, _, parts = sorted(runs)[len(runs) // 2]
        print(f"| {name} | {seconds:.1f} | {seconds / bare:.2f} | {statistics.median(cpu for _, cpu, _ in runs):.1f} | {parts} |")


if __name__ == "__main__":
    main()
