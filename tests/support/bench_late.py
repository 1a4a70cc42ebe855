"""A training step of late interaction against the authors' step: encoders, scores, loss, backward pass, clipping and Adam.

    python -m tests.support.bench_late                       # every row
    python -m tests.support.bench_late --rows sgr saf --batches 64 128 --rounds 3

Theirs is the published loop over captions (`itm.benchmarks.published_loops`) with the same encoders, weights and batch. Each run has a
process of its own, in turn, one thread: the CPU time of a step is the median over the runs, memory is what the peak of the process grew by
over its state before the first step. `bound` is what the products that a step cannot do without would allow at the rate of one large
product measured in the same process.
"""

from __future__ import annotations

import argparse
import json
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
from itm.matchers.late.scan import SCAN
from itm.matchers.late.sgraf import SAF, SGR
from itm.matchers.late.uarda import UARDA
from itm.methods.cusa import CUSA
from itm.methods.matching import Matching
from itm.training.optim import build_optimizer
from itm.training.step import Step
from itm.types import Batch, Captions, Images, Method, SoftLabels

VOCABULARY, REGIONS, IN_WIDTH, THRESHOLD = 8481, 36, 2048, 0.1
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


def run(row: str, side: str, rows: int, steps: int) -> dict[str, float]:
    """CPU seconds of a step, the median after one that is not counted, and GB that the peak of the process grew by."""
    batch, method = batch_of(rows), method_of(row)
    optimizer = build_optimizer(method, TRAIN)
    ours, theirs = Step(method, optimizer, TRAIN, lambda step: TRAIN.lr, None, 0), published(method, row)
    method.train()
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
    return {"seconds": statistics.median(seconds[1:]), "gb": (peak - before) / 1e6}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("row")
    parser.add_argument("side")
    parser.add_argument("batch", type=int)
    parser.add_argument("--steps", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"row": a.row, "side": a.side, "batch": a.batch} | run(a.row, a.side, a.batch, a.steps)))
