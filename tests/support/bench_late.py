"""A training step of late interaction against the authors' step: encoders, scores, loss, backward pass, clipping and Adam.

    python -m tests.support.bench_late                       # every row
    python -m tests.support.bench_late --rows sgr saf --batches 64 128 --rounds 3

Theirs is the published loop over captions (`itm.benchmarks.published_loops`) with the same layers, weights and batch, its words read by
torch's GRU as theirs are. Each run has a process of its own, in turn, one thread. CPU seconds of a step are medians; GB is what the peak of
the process grew by over its state before the first step, the state of Adam included. `bound` is theirs / ours if ours did nothing but the
products that a step cannot do without, at the rate of one large product measured in the same processes.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from itm.benchmarks.published_loops import naaf_loop, scan_loop, sgraf_loop
from itm.config import Train
from itm.matchers.encoders import packed_gru
from itm.matchers.late.scan import SCAN
from itm.matchers.late.sgraf import SAF, SGR
from itm.matchers.late.uarda import UARDA
from itm.methods.cusa import CUSA
from itm.methods.matching import Matching
from itm.training.optim import build_optimizer
from itm.training.step import Step
from itm.types import Batch, Captions, Images, Method, SoftLabels

VOCABULARY, REGIONS, IN_WIDTH, WIDTH, WORD, SIMILARITY, THRESHOLD = 8481, 36, 2048, 1024, 300, 256, 0.1
# (row, batch) -> theirs / ours that is wanted.
ROWS = {
    ("scan-t2i", 128): 3.3,
    ("scan-i2t", 128): 4.0,
    ("uarda", 128): 3.0,
    ("sgr", 64): 4.0,
    ("sgr", 128): 4.0,
    ("sgr-cusa", 64): 1.6,
    ("saf", 64): 1.8,
    ("saf", 128): 1.8,
}
TRAIN = Train(optimizer="adam", lr=2e-4, clip_norm=2.0, schedule="constant", weight_decay=0.0)


def batch_of(rows: int) -> Batch:
    """Random regions and tokens; lengths 6 + Poisson(8.5), start and end included; every pair of another image."""
    generator = torch.Generator().manual_seed(0)
    lengths = (6 + torch.poisson(torch.full((rows,), 8.5), generator=generator)).long().clamp(max=33).sort(descending=True).values
    mask = torch.arange(int(lengths[0])) < lengths[:, None]
    tokens = torch.randint(4, VOCABULARY, mask.shape, generator=generator) * mask
    own = torch.arange(rows)
    images = Images(own, regions=torch.randn(rows, REGIONS, IN_WIDTH, generator=generator).relu())
    teacher = SoftLabels(torch.randn(rows, 384, generator=generator), torch.randn(rows, 384, generator=generator))
    return Batch(images, Captions(tokens, mask, own), teacher)


def method_of(row: str) -> Method:
    torch.manual_seed(0)
    if row.startswith("scan"):
        matcher = SCAN(vocab_size=VOCABULARY, cross_attn=row.split("-")[1], agg_func="Mean", lambda_softmax=9.0 if "t2i" in row else 4.0)  # type: ignore[arg-type]
        return Matching(matcher, loss="triplet")
    if row == "uarda":
        return Matching(UARDA(vocab_size=VOCABULARY), loss="triplet")
    matcher = (SAF if row == "saf" else SGR)(vocab_size=VOCABULARY)
    return CUSA(matcher, triplet={}, csa=True, usa=False) if row.endswith("cusa") else Matching(matcher, loss="triplet")


def published(method: Method, row: str) -> Callable[[Batch], Tensor]:
    """The loss of a batch as the authors' programs compute it: one caption after the other, hinges on the hardest negatives."""
    matcher = method.matcher

    def scores(regions: Tensor, captions: list[Tensor]) -> Tensor:
        if row.startswith("scan"):
            return scan_loop(regions, captions, row.split("-")[1], 9.0 if "t2i" in row else 4.0)
        return naaf_loop(regions, captions, THRESHOLD, 20.0) if row == "uarda" else sgraf_loop(matcher, regions, captions)

    def loss(batch: Batch) -> Tensor:
        regions, words = matcher.encode_images(batch.images).parts, matcher.encode_captions(batch.captions).parts
        found = scores(regions, [row[:n] for row, n in zip(words, batch.captions.mask.sum(1).tolist(), strict=True)])
        total = hinges(found)
        if isinstance(method, CUSA):
            total = total + 0.1 * soft_labels(found, batch.teacher, *method.temperature("csa_student"), *method.temperature("csa_teacher"))
        return total

    return loss


def hinges(scores: Tensor, margin: float = 0.2) -> Tensor:
    own, diagonal = scores.diagonal()[:, None], torch.eye(len(scores), dtype=torch.bool)
    captions = (margin + scores - own).clamp(min=0).masked_fill(diagonal, 0)
    images = (margin + scores - own.T).clamp(min=0).masked_fill(diagonal, 0)
    return captions.max(1)[0].sum() + images.max(0)[0].sum()


def soft_labels(scores: Tensor, teacher: SoftLabels | None, *taus: Tensor) -> Tensor:
    assert teacher is not None and teacher.image is not None and teacher.text is not None
    total = scores.new_zeros(())
    for student, vectors, tau, teacher_tau in ((scores, teacher.image, *taus[::2]), (scores.T, teacher.text, *taus[1::2])):
        unit = nn.functional.normalize(vectors, dim=1)
        target = (unit @ unit.T / teacher_tau).log_softmax(1)
        total = total + nn.functional.kl_div((student / tau).log_softmax(1), target, reduction="batchmean", log_target=True)
    return total / 2


def products(row: str, batch: Batch) -> float:
    """FLOP of the products that no exact form of a step does without: encoders, all scores, and the gradient of those that have one."""
    pairs, lengths = len(batch.images) ** 2, batch.captions.mask.sum(1)
    words, length = float(lengths.sum()), float(lengths.float().mean())
    regions = 2 * 2.0 * len(batch.images) * REGIONS * IN_WIDTH * WIDTH  # no gradient of the regions is wanted
    gru = 2 * 3 * 2.0 * words * (WORD + WIDTH) * 3 * WIDTH
    score = 2.0 * REGIONS * WIDTH * length
    if row.startswith(("sgr", "saf")):
        score += 2.0 * (length + 1) * WIDTH * SIMILARITY + 2.0 * REGIONS * WIDTH * length
    if row.startswith("sgr"):
        score += 2 * (4.0 * SIMILARITY**2 * (length + 1) + 4.0 * SIMILARITY * (length + 1) ** 2)
    with_gradient = pairs if row in ("saf", "sgr-cusa") else 3 * len(batch.images)
    return regions + gru + score * (pairs + 2 * with_gradient)


def rate(copy: bool = False) -> float:
    """FLOP per CPU second of one large product, or bytes read and written by one large copy."""
    left, right = torch.randn(4096, 1024), torch.randn(1024, 1024)
    large = torch.randn(1 << 24)
    there = torch.empty_like(large)
    spans = []
    for _ in range(7):
        begin = time.process_time()
        if copy:
            there.copy_(large)
        else:
            left @ right
        spans.append(time.process_time() - begin)
    return (8.0 * len(large) if copy else 2.0 * 4096 * 1024 * 1024) / statistics.median(spans)


def run(row: str, side: str, rows: int, steps: int) -> dict[str, float]:
    """CPU seconds of a step, the median after one that is not counted, and GB that the peak of the process grew by."""
    batch, method = batch_of(rows), method_of(row)
    optimizer = build_optimizer(method, TRAIN)
    ours, theirs = Step(method, optimizer, TRAIN, lambda step: TRAIN.lr, None, 0), published(method, row)
    method.train()
    if side == "theirs":
        packed_gru.serves = lambda *_: False
    product, copied = rate(), rate(copy=True)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for number in range(steps + 1):
        begin = time.process_time()
        if side == "ours":
            ours([batch], number)
        else:
            optimizer.zero_grad(set_to_none=True)
            theirs(batch).backward()
            nn.utils.clip_grad_norm_(method.parameters(), 2.0)
            optimizer.step()
        seconds.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bound = products(row, batch) / product
    return {"seconds": statistics.median(seconds[1:]), "gb": (peak - before) / 1e6, "bound": bound, "product": product, "copy": copied}


def compare(row: str, rows: int, rounds: int, steps: int) -> str:
    """A line of the table, measured in processes of their own, ours and theirs in turn."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for side in found:
            command = [sys.executable, "-m", "tests.support.bench_late", "--run", row, side, str(rows), str(steps)]
            found[side].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1]))
    ours, theirs = ({key: statistics.median(r[key] for r in done) for key in done[0]} for done in found.values())
    wanted = ROWS.get((row, rows))
    return (
        f"| {row} | {rows} | {ours['seconds']:.2f} | {theirs['seconds']:.2f} | **{theirs['seconds'] / ours['seconds']:.2f}** "
        f"| {'' if wanted is None else wanted} | {theirs['seconds'] / ours['bound']:.1f} | {ours['gb']:.2f} | {theirs['gb']:.2f} "
        f"| {ours['product'] / 1e9:.0f} | {ours['copy'] / 1e9:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=sorted({row for row, _ in ROWS}))
    parser.add_argument("--batches", nargs="*", type=int, help="unset: the published ones of each row")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="timed in each process")
    parser.add_argument("--run", nargs=4, metavar=("ROW", "SIDE", "BATCH", "STEPS"), help="measure this alone, in this process")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.run:
        row, side, rows, steps = args.run
        print(json.dumps(run(row, side, int(rows), int(steps))), flush=True)
        return
    print(f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread, {args.rounds} x {args.steps} steps", flush=True)
    print("| step | batch | ours, CPU s | theirs | theirs / ours | wanted | bound | ours, GB | theirs | product GFLOP/s | copy GB/s |")
    print("|---" * 11 + "|", flush=True)
    for row, rows in ROWS if args.batches is None else [(row, rows) for row in args.rows for rows in args.batches]:
        if row in args.rows:
            print(compare(row, rows, args.rounds, args.steps), flush=True)


if __name__ == "__main__":
    main()
