"""Scoring speed against the published loops, and the time of a COCO 5K evaluation: `itm bench`, or `python -m itm.benchmarks.scoring`.

Ours and the peer (`itm.benchmarks.published_loops`) run in turns on the same random parts of the published size (36 x 1024 regions, 14 to
15 tokens); medians are compared. A loop over captions costs the same for each, so the peer takes every n-th caption. `bound` is what the
matrix products of our form alone would allow at the rate of one large product measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.benchmarks import pruning
from itm.benchmarks.arguments import add_arguments
from itm.benchmarks.measuring import REGIONS, WIDTH, World, alternate, world
from itm.benchmarks.published_loops import naaf_loop, scan_loop, sgraf_loop
from itm.data.files import write_atomic
from itm.evaluation.dataset import names_of
from itm.evaluation.metrics import retrieval_metrics
from itm.evaluation.protocols import Scored, run_protocol
from itm.evaluation.scoring import score_matrix
from itm.matchers.late.base import parts_of
from itm.matchers.late.scan import SCAN
from itm.matchers.late.sgraf import SAF, SGR
from itm.matchers.late.tiles import product
from itm.matchers.late.uarda import UARDA
from itm.types import Encoded, Matcher

SIMILARITY, STEPS = 256, 3
THRESHOLD = 0.1
COCO_5K_PAIRS = 5_000 * 25_000


@dataclass(frozen=True)
class Row:
    """One line of the table: pairs per second of CPU and wall time, ours and the peer's; memory in MB above the inputs."""

    name: str
    precision: str
    peer: str
    ours_cpu: float
    ours_wall: float
    peer_cpu: float
    peer_wall: float
    ratio_cpu: float
    ratio_wall: float
    bound: float
    difference: float
    r_at_k: float
    ours_mb: float
    peer_mb: float

    @property
    def of_bound(self) -> float:
        """Share of the bound that ours reaches."""
        return self.ours_cpu / self.bound

    @property
    def coco_5k(self) -> float:
        """Minutes that 5,000 x 25,000 pairs would take at our rate."""
        return COCO_5K_PAIRS / self.ours_wall / 60


def competitors(kind: str, where: World) -> tuple[Any, Callable[[torch.dtype], Tensor]]:
    """(our matcher, the published loop in a type) of a kind."""
    regions = parts_of(where.images)[0]
    matcher: Any
    if kind.startswith("SCAN"):
        direction, smooth = kind.split()[1], 9.0 if kind.endswith("t2i") else 4.0
        matcher = SCAN(vocab_size=4, cross_attn=direction, agg_func="Mean", lambda_softmax=smooth)  # type: ignore[arg-type]
        loop = lambda r, c: scan_loop(r, c, direction, smooth)
    elif kind == "UARDA":
        matcher = UARDA(vocab_size=4, eval_threshold=THRESHOLD)
        loop = lambda r, c: naaf_loop(r, c, THRESHOLD, 20.0)
    else:
        matcher = {"SGR": SGR, "SAF": SAF}[kind](vocab_size=4)
        loop = lambda r, c: sgraf_loop(matcher, r, c)
    matcher.eval().to(regions.device)
    typed: dict[torch.dtype, tuple[Tensor, list[Tensor]]] = {}

    def peer(dtype: torch.dtype) -> Tensor:
        if dtype not in typed:  # casting is not timed: the warm-up run does it
            typed[dtype] = regions.to(dtype), [row.to(dtype) for row in where.ragged]
        return loop(*typed[dtype])

    return matcher, peer


@torch.no_grad()
def compare(kind: str, where: World, rounds: int, rates: dict[str, float], fuse: bool = False) -> list[Row]:
    """Rows of one kind: our float32 and bfloat16 against each published loop (SCAN in float64, as published, and float32)."""
    matcher, peer = competitors(kind, where)
    matcher.fuse_tiles = fuse
    device = parts_of(where.images)[0].device.type
    peers = {"float32": torch.float32} | ({"float64": torch.float64} if kind.startswith("SCAN") else {})
    works: dict[str, Callable[[], Tensor]] = {
        precision: lambda precision=precision: score_matrix(matcher, where.images, where.captions, device=device, precision=precision)  # type: ignore[misc]
        for precision in ("fp32", "bf16")
    }
    works |= {name: lambda dtype=dtype: peer(dtype) for name, dtype in peers.items()}  # type: ignore[misc]
    spans, memory, results = alternate(works, rounds, device)
    pairs = {name: len(where.images) * (len(where.captions) if name in ("fp32", "bf16") else len(where.ragged)) for name in works}
    rate = {name: [pairs[name] / statistics.median(times) for times in zip(*spans[name], strict=True)] for name in works}
    truth = torch.arange(len(where.images)), torch.arange(len(where.captions)) % len(where.images)
    recalls = {p: retrieval_metrics(results[p], truth) for p in ("fp32", "bf16")}
    moved = max(abs(recalls["fp32"][k] - recalls["bf16"][k]) for k in recalls["fp32"] if k[4:] in ("r1", "r5", "r10"))
    length = float(parts_of(where.captions)[1].sum(1).float().mean())
    return [
        Row(
            kind,
            precision,
            name,
            rate[precision][0],
            rate[precision][1],
            rate[name][0],
            rate[name][1],
            rate[precision][0] / rate[name][0],
            rate[precision][1] / rate[name][1],
            rates[precision] / flops(kind, length),
            float((results[precision][:, :: where.every] - results[name].cpu()).abs().max()),
            moved if precision == "bf16" else 0.0,
            memory[precision],
            memory[name],
        )
        for precision in ("fp32", "bf16")
        for name in peers
    ]


def flops(kind: str, length: float) -> float:
    """Floating-point operations of the large products that our form needs for a pair (docs/methods/sgraf.md#cost-of-a-pair)."""
    attention, nodes = 2 * REGIONS * WIDTH * length, length + 1
    if kind not in ("SGR", "SAF"):
        return attention
    common = 2 * attention + 2 * WIDTH * SIMILARITY * nodes
    return common + (STEPS - 1) * (4 * SIMILARITY**2 * nodes + 4 * SIMILARITY * nodes**2) * (kind == "SGR")


def product_rates(device: str, rounds: int) -> dict[str, float]:
    """Operations per second of CPU time (GPU: wall time) of one large product, by precision."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = (torch.randn(rows, WIDTH, device=device).to(dtype) for rows in (3600, 960))
        spans, _, _ = alternate({name: lambda left=left, right=right: product(left, right)}, 2 * rounds, device)  # type: ignore[misc]
        found[name] = 2 * 3600 * 960 * WIDTH / statistics.median(span[device != "cpu"] for span in spans[name])
    return found


@torch.no_grad()
def coco_5k(rounds: int, device: str) -> dict[str, float]:
    """Median seconds and MB of a dual encoder's evaluation, 5,000 x 25,000 vectors of width 512: scores, coco-5k, coco-1k-5fold.

    MB: peak above the vectors and the score matrix (500 MB), which are not counted.
    """
    images = F.normalize(torch.randn(5000, 512), dim=1)
    captions = F.normalize(images.repeat_interleave(5, 0) + 0.15 * torch.randn(25000, 512), dim=1)
    sides = Encoded(vector=images), Encoded(vector=captions)
    matrix: list[Tensor] = []

    class Dual(Matcher):
        def score(self, images: Encoded, captions: Encoded) -> Tensor:
            return images.vector @ captions.vector.T  # type: ignore[operator,union-attr]

    def scoring() -> Tensor:
        matrix[:] = [score_matrix(Dual(), *sides, device=device)]
        return matrix[0]

    def metrics() -> Tensor:
        scored = Scored(matrix[0], names_of(5000, torch.arange(25000) // 5))
        return torch.tensor([run_protocol(name, scored).metrics["rsum"] for name in ("coco-5k", "coco-1k-5fold")])

    spans, memory, _ = alternate({"scores": scoring, "metrics": metrics}, rounds, device)
    found = {f"{name}_{kind}": statistics.median(s[k] for s in spans[name]) for name in spans for k, kind in enumerate(("cpu", "wall"))}
    return found | {"metrics_mb": memory["metrics"], "scores_mb": memory["scores"]}


def table(rows: list[Row]) -> str:
    heads = ["ours/CPU-s", "peer/CPU-s", "x CPU", "x wall", "of bound", "COCO 5K min", "max |d|", "R@K moved", "ours MB", "peer MB"]
    lines = [f"{'':<9} {'ours':<5} {'peer':<8}" + "".join(f"{head:>12}" for head in heads)]
    for r in rows:
        rates = f"{r.ours_cpu:>12,.0f}{r.peer_cpu:>12,.0f}{r.ratio_cpu:>12.1f}{r.ratio_wall:>12.1f}{r.of_bound:>12.0%}{r.coco_5k:>12.1f}"
        rest = f"{r.difference:>12.1e}{r.r_at_k:>12.2f}{r.ours_mb:>12.0f}{r.peer_mb:>12.0f}"
        lines.append(f"{r.name:<9} {r.precision:<5} {r.peer:<8}{rates}{rest}")
    return "\n".join(lines)


def plot(rows: list[Row], path: str) -> None:
    """Bars of the CPU ratios. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 0.4 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([f"{r.name} {r.precision} / {r.peer}" for r in rows], [r.ratio_cpu for r in rows])
    axes.bar_label(bars, fmt="%.1f")
    axes.invert_yaxis()
    axes.set_xlabel("pairs per CPU second, times the published loop")
    figure.savefig(path)


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rates = product_rates(args.device, args.rounds)
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "device": args.device, "rounds": args.rounds, **rates}
    print(f"one thread, medians of {args.rounds} alternating runs; one large product: " + _rates(rates), flush=True)
    rows: list[Row] = []
    where = world(args.images, args.captions, args.every, args.device) if args.what != "metrics" else None
    if where and args.what != "pruning":
        tokens = float(parts_of(where.captions)[1].sum(1).float().mean())
        print(f"{args.images} images x {REGIONS} x {WIDTH}, {args.captions} captions of {tokens:.1f} tokens")
        for kind in args.kinds:
            rows += compare(kind, where, args.rounds, rates, args.compile)
            print(table(rows[-(4 if kind.startswith("SCAN") else 2) :]), flush=True)
    cuts = pruned(where, args) if where and args.what != "scoring" else []
    metrics = coco_5k(args.rounds, args.device) if args.what in ("metrics", "all") else {}
    if metrics:
        print("COCO 5K, 5,000 x 25,000, width 512: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
    if args.json:
        found = {"about": about, "rows": [asdict(row) for row in rows], "pruning": cuts, "metrics": metrics}
        write_atomic(args.json, json.dumps(found, indent=1).encode())
    if args.plot and rows:
        plot(rows, args.plot)
    return 0


def pruned(where: World, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Shows what UARDA's threshold saves; its rows."""
    rows = pruning.measure(where, args.rounds, args.device)
    print(f"UARDA, {args.images} images, {args.captions} captions, with and without pruning:\n{pruning.table(rows)}", flush=True)
    return [asdict(row) for row in rows]


def _rates(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
