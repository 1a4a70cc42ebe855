"""`python -m tests.bench`: scoring speed against the published algorithm written plainly, same process, same threads, medians.

The peer is the loop of the SCAN code: for each caption, attend from every image and materialise the attended context. Both are timed in
turns on the same random parts of the published size; the ratio of medians and the largest difference of scores are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from itm.models.scan import SCAN
from itm.types import Encoded

CLAMP = 1e-8


def l2(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True).sqrt() + CLAMP)


def published_loop(regions: Tensor, captions: list[Tensor], direction: str, smooth: float) -> Tensor:
    """(I,T) SCAN scores, clipped_l2norm and mean aggregation, one caption at a time."""
    columns = []
    for words in captions:
        repeated = words[None].expand(len(regions), -1, -1).contiguous()
        query, context = (repeated, regions) if direction == "t2i" else (regions, repeated)
        attention = torch.nn.functional.leaky_relu(context @ query.transpose(1, 2), 0.1)
        weights = (l2(attention).transpose(1, 2).contiguous() * smooth).softmax(-1)
        attended = (context.transpose(1, 2) @ weights.transpose(1, 2)).transpose(1, 2)
        norms = (query.norm(dim=2) * attended.norm(dim=2)).clamp(min=CLAMP)
        columns.append(((query * attended).sum(2) / norms).mean(1))
    return torch.stack(columns, 1)


def timed(work: Callable[[], Tensor], rounds: int) -> tuple[float, Tensor]:
    """(median CPU seconds, last result)."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


@torch.no_grad()
def compare(direction: str, args: argparse.Namespace) -> str:
    width, smooth = 1024, 9.0 if direction == "t2i" else 4.0
    matcher = SCAN(vocab_size=4, cross_attn=direction, agg_func="Mean", lambda_softmax=smooth).eval()  # type: ignore[arg-type]
    regions = l2(torch.randn(args.images, 36, width))
    lengths = torch.randint(8, 22, (args.captions,))
    words, mask = l2(torch.randn(args.captions, 21, width)), torch.arange(21)[None] < lengths[:, None]
    images = Encoded(parts=regions, mask=torch.ones(args.images, 36, dtype=torch.bool))
    texts = Encoded(parts=words * mask[..., None], mask=mask)
    ragged = [row[:n] for row, n in zip(words, lengths.tolist(), strict=True)]
    ours, scores = timed(lambda: matcher.score(images, texts), args.rounds)
    cells = []
    for dtype in (torch.float64, torch.float32):
        typed = regions.to(dtype), [row.to(dtype) for row in ragged]
        peer, wanted = timed(lambda typed=typed: published_loop(*typed, direction, smooth), args.rounds)  # type: ignore[misc]
        cells.append(f"{peer / ours:6.1f}x (max |d| {float((scores - wanted).abs().max()):.1e})")
    pairs = args.images * args.captions / ours
    return f"SCAN {direction}   {pairs:10,.0f} pairs/CPU-s   against float64 loop {cells[0]}   against float32 loop {cells[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(
        f"{args.images} images x 36 regions x 1024, {args.captions} captions of 8-21 words, one thread, median CPU seconds of {args.rounds}"
    )
    for direction in ("t2i", "i2t"):
        print(compare(direction, args), flush=True)


if __name__ == "__main__":
    main()
