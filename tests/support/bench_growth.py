"""How time and memory grow: each part of the pipeline at four sizes or more, the exponent of its curve, and pictures.

    python -m tests.support.bench_growth                      # all curves, into docs/results; twenty minutes of a CPU
    python -m tests.support.bench_growth --tiny --out /tmp/g  # the same curves at sizes of a test
    python -m tests.support.bench_growth search planner       # some of them

A curve runs in a process of its own, small sizes first. Time is CPU time of that process, the least of three rounds: it does not count
what else the machine does. Memory is the highest of the process above what it held before the round. The exponent is the slope of the
logarithms: 1 = twice the size takes twice as long. Sizes double at least, and the last three points count: at small sizes fixed costs
hide the growth.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from tests.support import ROOT

ROUNDS, WIDTH, REGIONS, WORDS = 3, 128, 36, 12
Work = Callable[[], Any]


@dataclass(frozen=True)
class Curve:
    """about: what is measured; unit: of the sizes; expected: the exponent that the algorithm has; make: size -> the work to be timed."""

    about: str
    unit: str
    expected: float
    sizes: tuple[int, ...]
    tiny: tuple[int, ...]
    make: str


CURVES = {
    "scoring_vectors": Curve(
        "scores of n images x 5n captions, one vector each", "images", 2, (1000, 2000, 4000, 8000), (20, 40, 80, 160), "vectors"
    ),
    "scoring_regions": Curve(
        "scores of n images x 5n captions by SCAN, 36 regions x 12 words", "images", 2, (20, 40, 80, 160), (2, 4, 8, 16), "regions"
    ),
    "training_step": Curve("a training step of a small dual encoder", "pairs a batch", 1, (32, 64, 128, 256), (4, 8, 16, 32), "step"),
    "evaluation": Curve("recalls and map@R of n images x 5n captions", "images", 2, (500, 1000, 2000, 4000), (10, 20, 40, 80), "recalls"),
    "search": Curve("the ten best of n vectors", "vectors", 1, (50_000, 100_000, 200_000, 400_000), (500, 1000, 2000, 4000), "search"),
    "planner": Curve(
        "manifest read, checked and planned, first batch", "shards", 1, (10_000, 20_000, 40_000, 80_000), (50, 100, 200, 400), "planner"
    ),
    "resume": Curve(
        "a plan taken up in the middle of an epoch", "shards", 1, (10_000, 20_000, 40_000, 80_000), (50, 100, 200, 400), "resume"
    ),
    "next_step": Curve("the next 100 batches of a plan", "shards", 0, (10_000, 20_000, 40_000, 80_000), (50, 100, 200, 400), "steps"),
    "teach": Curve("a teacher's vectors of n shards of 50 images, written", "shards", 1, (4, 8, 16, 32), (1, 2, 4, 8), "teach"),
}


# --- what is timed ----------------------------------------------------------------------------------------------------------------------


def vectors(size: int, folder: Path) -> Work:
    import torch
    from torch.nn import functional as F

    from itm.evaluation.scoring import score_matrix
    from itm.types import Encoded

    images, captions = (Encoded(vector=F.normalize(torch.randn(rows, WIDTH), dim=1)) for rows in (size, 5 * size))
    return lambda: score_matrix(_dual(), images, captions)


def regions(size: int, folder: Path) -> Work:
    import torch
    from torch.nn import functional as F

    from itm.evaluation.scoring import score_matrix
    from itm.types import Encoded
    from tests.support.every_matcher import matcher_of

    def parts(rows: int, count: int) -> Encoded:
        return Encoded(parts=F.normalize(torch.randn(rows, count, WIDTH), dim=-1), mask=torch.ones(rows, count, dtype=torch.bool))

    images, captions, scan = parts(size, REGIONS), parts(5 * size, WORDS), matcher_of("scan")
    return lambda: score_matrix(scan, images, captions)


def step(size: int, folder: Path) -> Work:
    import torch

    from itm.config import Train
    from itm.methods.matching import Matching
    from itm.training.optim import build_optimizer
    from itm.training.step import Step
    from itm.types import Batch, Captions, Images

    train = Train(batch_size=size)
    method = Matching(_dual())
    taken = Step(method, build_optimizer(method, train), train, lambda number: 1e-3, None, 0)
    ids, tokens = torch.arange(size), torch.randint(1, 50, (size, WORDS))
    pixels = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(Images(ids, pixels=pixels), Captions(tokens, torch.ones_like(tokens, dtype=torch.bool), ids))
    return lambda: taken([batch], 0)


def recalls(size: int, folder: Path) -> Work:
    import torch

    from itm.evaluation.metrics import retrieval_metrics

    scores, of = torch.randn(size, 5 * size), torch.arange(size)
    return lambda: retrieval_metrics(scores, (of, of.repeat_interleave(5)))


def search(size: int, folder: Path) -> Work:
    import torch
    from torch.nn import functional as F

    from itm.evaluation.scoring import score_matrix
    from itm.types import Encoded

    gallery, asked, dual = Encoded(vector=F.normalize(torch.randn(size, WIDTH), dim=1)), Encoded(vector=torch.randn(1, WIDTH)), _dual()
    return lambda: score_matrix(dual, gallery, asked)[:, 0].topk(min(10, size))


def planner(size: int, folder: Path) -> Work:
    from itm.data.manifest import write_manifest
    from itm.data.plan import Plan
    from itm.data.shards import read_manifest
    from tests.support.bench_scale import made_up

    write_manifest(str(folder / "train"), made_up(size))
    return lambda: Plan.of(read_manifest(str(folder / "train")), seed=0, batch=512, ranks=8).batch_pairs(0, 0, 0)


def resume(size: int, folder: Path) -> Work:
    from itm.data.plan import Plan, Position
    from tests.support.bench_scale import made_up

    manifest, epochs = made_up(size), iter(range(1, 1000))
    plan = Plan.of(manifest, seed=0, batch=512, ranks=8)
    return lambda: plan.resume(Position(7, next(epochs), plan.pairs // 2)).batch_pairs(7, 0, 0)


def steps(size: int, folder: Path) -> Work:
    from itm.data.plan import Plan
    from tests.support.bench_scale import made_up

    plan = Plan.of(made_up(size), seed=0, batch=512, ranks=8)
    plan.batch_pairs(0, 0, 0)
    numbers = count(1)

    def taken() -> None:
        for number in islice(numbers, 100):
            plan.batch_pairs(number, 0, 0)

    return taken


def teach(size: int, folder: Path) -> Work:
    import pyarrow as pa

    from itm.config import Part
    from itm.data.sidecar import Header
    from itm.teachers.identity import build_teacher
    from itm.teachers.stores import stored_identity
    from pipelines.teaching.actors import Prepare, Score
    from tests.support.small_teaching import pack, scenes

    manifest, part = pack(folder, scenes(50 * size), per_shard=50), Part(kind="statistics")
    teacher = build_teacher(part, "image")
    identity = stored_identity(teacher, "fp16")
    rows = []
    for shard in manifest.shards:
        header = Header(identity, "image", "fp16", shard.name, shard.sha256)
        rows.append({"shard": f"{folder}/train/{shard.name}", "header": json.dumps(vars(header))})
    prepare, score = Prepare("image", teacher.prepare), Score(part, "image", f"{folder}/store", 64)

    def taught() -> None:
        for row in rows:
            (said,) = score(prepare(pa.Table.from_pylist([row]))).to_pylist()
            if said["error"]:
                raise ValueError(said["error"])

    return taught


def _dual() -> Any:
    from itm.matchers.dual import DualEncoder

    image, text = {"kind": "conv", "image_size": 32, "hidden": 32}, {"kind": "pooled_gru", "word_dim": 32, "hidden": 32}
    return DualEncoder(vocab_size=50, image=image, text=text, width=WIDTH)


# --- measuring --------------------------------------------------------------------------------------------------------------------------


def points(name: str, tiny: bool) -> list[dict[str, float]]:
    """size, seconds and MB of each size of a curve, in this process."""
    import torch

    from tests.support.bench_scale import peak

    torch.set_num_threads(1)
    curve, found = CURVES[name], []
    make = globals()[curve.make]
    with tempfile.TemporaryDirectory() as scratch:
        make(curve.tiny[0], Path(scratch) / "warm")()
        for size in curve.tiny if tiny else curve.sizes:
            work = make(size, Path(scratch) / str(size))
            spans, before = [], peak(afresh=True)
            for _ in range(ROUNDS):
                start = time.process_time()
                work()
                spans.append(time.process_time() - start)
            found.append({"size": size, "seconds": min(spans), "mb": max(0.0, peak() - before)})
    return found


def exponent(found: list[dict[str, float]], what: str = "seconds") -> float:
    """The slope of the logarithms over the last three sizes, by least squares."""
    logs = [(math.log(p["size"]), math.log(max(p[what], 1e-9))) for p in found[-3:]]
    mean = [sum(values) / len(logs) for values in zip(*logs, strict=True)]
    return sum((x - mean[0]) * (y - mean[1]) for x, y in logs) / sum((x - mean[0]) ** 2 for x, _ in logs)


def picture(results: dict[str, list[dict[str, float]]], what: str, path: Path) -> None:
    """All curves against the factor of their size, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "itm"
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    for name, found in results.items():
        slope = exponent(found, what) if what == "seconds" else 0.0
        label = f"{name}, n^{slope:.2f}" if what == "seconds" else name
        axes.loglog(
            [p["size"] / found[0]["size"] for p in found],
            [max(p[what], 0.1 if what == "mb" else 1e-9) for p in found],
            marker="o",
            label=label,
        )
    axes.set_xlabel("size, as a factor of the smallest")
    axes.set_ylabel("CPU seconds" if what == "seconds" else "MB above the start")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


PAGE = """# Growth

How time and memory grow with sizes, measured by `make bench-growth` on {machine}. A curve runs in a process of its own on one core; time is
its CPU time, the least of three rounds, memory the highest above the start of the round. The exponent is the slope of the logarithms over
the last three sizes: 1 means that twice the size takes twice as long; beside it stands what the algorithm lets one expect. An exponent
below that one says that fixed costs are still a part of the time.

![CPU seconds of each part against its size, both logarithmic](growth-seconds.svg)

![Memory of each part against its size, both logarithmic](growth-mb.svg)

| What | Sizes | CPU seconds | MB | Exponent | Expected |
|---|---|---|---|---|---|
{rows}

The figures are in `growth.json` beside this page.
"""


def page(results: dict[str, list[dict[str, float]]]) -> str:
    """The page about the results, made from them alone."""
    import platform

    rows = []
    for name, found in results.items():
        curve = CURVES[name]
        sizes = " / ".join(f"{p['size']:,.0f}" for p in found)
        seconds, mb = (" / ".join(f"{p[key]:.3g}" for p in found) for key in ("seconds", "mb"))
        rows.append(f"| {curve.about} | {sizes} {curve.unit} | {seconds} | {mb} | {exponent(found):.2f} | {curve.expected:g} |")
    return PAGE.format(machine=f"Python {platform.python_version()}, {platform.machine()}", rows="\n".join(rows))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="*", metavar="curve", help=f"some of {', '.join(CURVES)}")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="folder of growth.json and the pictures")
    args = parser.parse_args(arguments)
    if unknown := set(args.curves) - set(CURVES):
        parser.error(f"unknown curves {sorted(unknown)}")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, float]]] = {}
    for name in args.curves or CURVES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[name] = [{key: float(f"{value:.4g}") for key, value in p.items()} for p in pool.apply(points, (name, args.tiny))]
        shown = "  ".join(f"{p['size']:g}: {p['seconds']:.3g} s {p['mb']:.3g} MB" for p in results[name])
        print(f"{name:<16} n^{exponent(results[name]):.2f} (expected {CURVES[name].expected:g})  {shown}", flush=True)
    (args.out / "growth.json").write_text(json.dumps(results, indent=1) + "\n")
    if not args.curves:
        (args.out / "growth.md").write_text(page(results))
    for what in ("seconds", "mb"):
        picture(results, what, args.out / f"growth-{what}.svg")


if __name__ == "__main__":
    main()
