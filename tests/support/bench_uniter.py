"""A half step of IAIS against its step written plainly, and what a pair of UNITER costs: padding, and share of the product rate.

    python -m tests.support.bench_uniter --layers 2 --pool 200

UNITER of base width with fewer layers, random weights; pools of one caption with many images (anchor L) and one image with many captions
(anchor V), as the authors' 400. Regions of an image: 10 to 100, normal about 37 with a deviation of 15; words 6 + Poisson(8.5). Ours and
theirs (`itm.benchmarks.published_loops.iais_half`) in turn, CPU seconds of one thread, backward pass included; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from itm.benchmarks.published_loops import iais_half
from itm.matchers.joint.uniter import UNITER
from itm.methods.iais import IAIS
from itm.types import Captions, Images
from tests.support.bench_late import rate
from tests.support.iais_pools import pool_step

WORDS, HARD, SIDE = 28996, 31, 16


def pool_of(anchor: str, rows: int) -> dict[str, Tensor]:
    """A padded pool as `iais_half` takes it; row 0 is the positive."""
    generator = torch.Generator().manual_seed(0)
    images, captions = (1, rows) if anchor == "V" else (rows, 1)
    counts = (37 + 15 * torch.randn(images, generator=generator)).round().long().clamp(10, 100)
    lengths = (6 + torch.poisson(torch.full((captions,), 8.5), generator=generator)).long()
    region_mask = torch.arange(int(counts.max())) < counts[:, None]
    word_mask = torch.arange(int(lengths.max())) < lengths[:, None]
    regions, boxes = torch.randn(*region_mask.shape, 2048, generator=generator), torch.rand(*region_mask.shape, 7, generator=generator)
    tokens = torch.randint(5, WORDS, word_mask.shape, generator=generator) * word_mask
    found = {"regions": regions, "boxes": boxes, "region_mask": region_mask, "tokens": tokens, "word_mask": word_mask}
    return {name: x.expand(rows, *x.shape[1:]) for name, x in found.items()}


def sides(pool: dict[str, Tensor], anchor: str) -> tuple[Images, Captions]:
    """The two sides, the repeated one once."""
    own = {name: x[:1] if (name in ("tokens", "word_mask")) == (anchor == "L") else x for name, x in pool.items()}
    images = Images(torch.arange(len(own["regions"])), regions=own["regions"], boxes=own["boxes"], mask=own["region_mask"])
    return images, Captions(own["tokens"], own["word_mask"], torch.arange(len(own["tokens"])))


def flops(matcher: UNITER, tokens: int, squares: int) -> float:
    """Of the products of a forward pass over so many real tokens, whose pairs have so many squared lengths together."""
    hidden, layers = matcher.vector_width, len(matcher.uniter.encoder.layer)
    return layers * (24.0 * hidden**2 * tokens + 4.0 * hidden * squares)


def timed(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def half_step(matcher: UNITER, anchor: str, rows: int, rounds: int) -> str:
    pool, method = pool_of(anchor, rows), IAIS(matcher, weight=1.0, schedule="constant", ranking={"hard_negatives": HARD})
    method.train()
    images, captions = sides(pool, anchor)

    def ours() -> float:
        terms = pool_step(method, images, captions)
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        return float(total.detach())

    def theirs() -> float:
        total = torch.stack(iais_half(matcher, pool, anchor, HARD)).sum()
        total.backward()
        return float(total.detach())

    said = ours(), theirs()  # not counted
    assert abs(said[0] - said[1]) < 1e-4 * abs(said[1]), said
    spans: list[tuple[float, float]] = [(timed(ours), timed(theirs)) for _ in range(rounds)]
    mine, other = (statistics.median(column) for column in zip(*spans, strict=True))
    lengths = pool["region_mask"].sum(1) + pool["word_mask"].sum(1)
    own = lengths[: HARD + 1]
    work = flops(matcher, int(lengths.sum()), int(lengths.square().sum())) + 3 * flops(matcher, int(own.sum()), int(own.square().sum()))
    bound = work / rate()
    return f"| IAIS half step, anchor {anchor}, pool {rows} | {mine:.2f} | {other:.2f} | **{other / mine:.2f}** | {other / bound:.1f} |"


@torch.no_grad()
def scoring(matcher: UNITER, rounds: int) -> str:
    """SIDE images x SIDE captions: share of padding among the tokens that are computed, and of the product rate that is reached."""
    matcher.eval()
    images, captions = sides(pool_of("L", SIDE), "L")[0], sides(pool_of("V", SIDE), "V")[1]
    left, right = matcher.encode_images(images), matcher.encode_captions(captions)
    computed: list[int] = []
    layer = matcher.uniter.encoder.layer[0]
    hook = layer.register_forward_pre_hook(lambda _, given: computed.append(given[0].shape[0] * given[0].shape[1]))
    matcher.score(left, right)
    hook.remove()
    assert images.mask is not None
    lengths = images.mask.sum(1)[:, None] + captions.mask.sum(1)[None]
    padded = len(images) * len(captions) * (images.mask.shape[1] + captions.mask.shape[1])
    seconds = statistics.median(timed(lambda: matcher.score(left, right)) for _ in range(rounds))
    reached = flops(matcher, int(lengths.sum()), int(lengths.square().sum())) / seconds
    wasted = [1 - int(lengths.sum()) / n for n in (sum(computed), padded)]
    return (
        f"| UNITER score, {SIDE} x {SIDE} pairs | {seconds * 1e3 / lengths.numel():.1f} CPU-ms a pair "
        f"| padding {wasted[0]:.1%} of the tokens (padded layout {wasted[1]:.0%}) | **{reached / rate():.0%}** of the product rate |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pool", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    matcher = UNITER(vocab_size=WORDS, layers=args.layers, dropout=0.0)
    print(f"{args.layers} layers of width 768, one thread, medians of {args.rounds}", flush=True)
    print(scoring(matcher, args.rounds), flush=True)
    for anchor in ("L", "V"):
        print(half_step(matcher, anchor, args.pool, args.rounds), flush=True)


if __name__ == "__main__":
    main()
