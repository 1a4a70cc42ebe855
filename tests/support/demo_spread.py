"""`python -m tests.support.demo_spread`: how far one run of the demo lies from the next.

The demo's world is packed and taught once; its three recipes are trained on it with several seeds, each under three settings of the
instructions that torch may use: all that the CPU has, AVX2, and SSE4.1. Two trainings run at a time, each in a process of its own, because
torch reads these settings once. Every finished run is in the JSON file, and a restart goes on from there. The tables beside it are made
from the JSON file alone, and the figures that `itm demo` judges its own run by (`pipelines.demo.EXPECTED`) are held equal to it by a test.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itm.config import Recipe, load_recipe
from itm.data import files
from itm.data.shards import read_manifest
from pipelines.cli import RECIPES
from pipelines.demo import RUNS

RESULT = Path(__file__).resolve().parents[2] / "docs/results/demo_spread.json"
SETTINGS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}
BASE, TRUE, SHUFFLED = RUNS
GAINS = {"over contrastive": BASE, "over shuffled": SHUFFLED}
STORED = ("t2i_map_at_r", "i2t_map_at_r", "rsum")
Run = dict[str, Any]
MEASURES: dict[str, Callable[[Run], float]] = {
    "mAP@R, mean of both": lambda run: (run["t2i_map_at_r"] + run["i2t_map_at_r"]) / 2,
    "mAP@R t2i": lambda run: float(run["t2i_map_at_r"]),
    "mAP@R i2t": lambda run: float(run["i2t_map_at_r"]),
    "rSum": lambda run: float(run["rsum"]),
}
AT_A_TIME = 2
WHY_SMALL = (
    "",
    "The world is small (162 scenes) so that most pairs of a batch meet another of the same scene, which contrastive learning alone pushes",
    "away. In the world `equiv` (512 scenes) with 480 such steps the true teacher's gain over contrastive was +.040 with seed 0 and -.033",
    "with seed 1, which shows nothing.",
)


@dataclass(frozen=True)
class Bench:
    """Where the runs lie, and what is overridden in all of them."""

    output: str
    overrides: tuple[str, ...] = ()

    def recipe(self, name: str, setting: str, seed: int) -> Recipe:
        places = [f"data.root={self.output}/shards", f"output={self.output}/{setting}-{seed}"]
        return load_recipe(RECIPES / f"{name}.yaml", [*self.overrides, *places, f"seed={seed}", "train.workers=0"])


def stated(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The choices that a shipped recipe makes, without prose and places: what a measured figure depends on."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", list(overrides))
    choices = recipe.model_dump(mode="json", exclude_unset=True, exclude={"about", "output", "registry"})
    choices["data"].pop("root")
    return choices


def prepare(bench: Bench) -> dict[str, Any]:
    """Pack and teach once; returns the facts under which runs may stand in one file."""
    from pipelines import pack, teach

    recipes = [bench.recipe(name, "native", 0) for name in RUNS]
    pack.pack(recipes[0])
    for recipe in recipes[1:]:
        teach.teach(recipe)
    return {
        "cpu": cpu_name(),
        "torch": importlib.metadata.version("torch"),
        "shards": {split: read_manifest(files.join(recipes[0].data.root, split)).fingerprint() for split in ("train", "val", "test")},
        "recipes": {name: stated(name, bench.overrides) for name in RUNS},
    }


def cpu_name() -> str:
    told = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in told if line.startswith("model name")), platform.processor())


def train_one(bench: Bench, setting: str, seed: int, name: str) -> Run:
    """One training and its evaluation, in this process, whose environment holds the setting already."""
    from pipelines import evaluate, train

    recipe = bench.recipe(name, setting, seed)
    train.train(recipe)
    metrics = evaluate.evaluate(recipe)["metrics"]
    return {"setting": setting, "seed": seed, "recipe": name, **{key: metrics[key] for key in STORED}, "cpu_s": round(time.process_time())}


def in_own_process(bench: Bench, setting: str, seed: int, name: str) -> Run:
    """`train_one` under the setting. Raises RuntimeError with the process's last words when it fails."""
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{bench.output}/{setting}-{seed}-{name}.db", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.demo_spread", *bench.overrides, "--output", bench.output]
    command += ["--one", setting, str(seed), name]
    done = subprocess.run(command, env={**os.environ, **tracking, **SETTINGS[setting]}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, seed {seed}, {setting}: {done.stderr[-2000:]}")
    found: Run = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(bench: Bench, result: Path, seeds: list[int]) -> dict[str, Any]:
    """Train what `result` lacks and write every run there as it ends. Raises ValueError when it holds runs of another world or machine."""
    facts = prepare(bench)
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {"facts": facts, "runs": []}
    other = [name for name, value in facts.items() if found["facts"][name] != value]
    if other:
        raise ValueError(f"{result} holds runs with other {', '.join(other)}: remove it, or name another --result")
    there = {(run["setting"], run["seed"], run["recipe"]) for run in found["runs"]}
    wanted = [(setting, seed, name) for seed, setting, name in itertools.product(seeds, SETTINGS, RUNS)]
    pool = ThreadPoolExecutor(AT_A_TIME)
    try:
        for done in as_completed([pool.submit(in_own_process, bench, *run) for run in wanted if run not in there]):
            found["runs"].append(done.result())
            write(result, found)
            print(json.dumps(done.result()), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    found["runs"].sort(key=lambda run: (list(SETTINGS).index(run["setting"]), run["seed"], RUNS.index(run["recipe"])))
    write(result, found)
    return found


def write(result: Path, found: dict[str, Any]) -> None:
    files.write_atomic(str(result), (json.dumps(found, indent=1) + "\n").encode())


def gains(runs: list[Run], other: str, measure_of: Callable[[Run], float], setting: str | None = None) -> list[float]:
    """True teacher - `other`, one a pair of runs of the same seed and setting; all settings, or one."""
    found = {(run["setting"], run["seed"], run["recipe"]): measure_of(run) for run in runs if setting in (None, run["setting"])}
    return [value - found[(*place, other)] for (*place, name), value in found.items() if name == TRUE]


def page(found: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    runs, facts = found["runs"], found["facts"]
    train = facts["recipes"][BASE]["train"]
    seeds = len({run["seed"] for run in runs})
    return "\n".join(
        [
            "# How far one run of the demo lies from the next",
            "",
            "`python -m tests.support.demo_spread` makes this page: the demo's three recipes on one packed world, "
            f"{train['steps']} steps of {train['batch_size']} pairs,",
            f"{seeds} seeds under each of three settings of the CPU's instructions, {len(runs)} runs. "
            f"{facts['cpu']}, torch {facts['torch']}; {sum(run['cpu_s'] for run in runs) / 60:.0f} minutes of CPU.",
            "Mean ± standard deviation over runs. A gain is that of one seed and setting: the true teacher's figure less the other's.",
            *WHY_SMALL,
            "",
            *rows_of_runs(runs),
            "",
            *rows_of_gains(runs),
            "",
        ]
    )


def rows_of_runs(runs: list[Run]) -> Iterator[str]:
    yield f"| setting | recipe | {' | '.join(MEASURES)} |"
    yield "|---" * (2 + len(MEASURES)) + "|"
    for setting, name in itertools.product((*SETTINGS, "all"), RUNS):
        some = [run for run in runs if run["recipe"] == name and setting in ("all", run["setting"])]
        yield f"| {setting} | {name} | " + " | ".join(cell([of(run) for run in some]) for of in MEASURES.values()) + " |"


def rows_of_gains(runs: list[Run]) -> Iterator[str]:
    yield f"| setting | gain | {' | '.join(MEASURES)} | least mAP@R, mean of both | mean / deviation |"
    yield "|---" * (4 + len(MEASURES)) + "|"
    for setting, (title, other) in itertools.product((*SETTINGS, None), GAINS.items()):
        some = [gains(runs, other, of, setting) for of in MEASURES.values()]
        ratio = statistics.fmean(some[0]) / statistics.stdev(some[0])
        cells = " | ".join(cell(values, "+") for values in some)
        yield f"| {setting or 'all'} | {title} | {cells} | {min(some[0]):+.3f} | {ratio:.1f} |"


def cell(values: list[float], sign: str = "") -> str:
    digits = 1 if max(map(abs, values)) > 1 else 3
    return f"{statistics.fmean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides for all three recipes, to try other choices")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", default="runs/demo_spread", help="shards and runs")
    parser.add_argument("--result", type=Path, default=RESULT, help="the JSON file; the page is written beside it")
    parser.add_argument("--one", nargs=3, metavar=("SETTING", "SEED", "RECIPE"), help="one run, in this process; its figures are printed")
    args = parser.parse_intermixed_args()
    bench = Bench(str(Path(args.output).absolute()), tuple(args.overrides))
    if args.one:
        setting, seed, name = args.one
        print(json.dumps(train_one(bench, setting, int(seed), name)))
        return
    found = measure(bench, args.result, args.seeds)
    args.result.with_suffix(".md").write_text(text := page(found))
    print(text)


if __name__ == "__main__":
    main()
