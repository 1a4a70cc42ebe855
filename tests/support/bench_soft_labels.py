"""What soft labels add to a step of CLIP ViT-B/32: CUSA's two terms over vectors in memory, beside the step of the towers.

    python -m tests.support.bench_soft_labels --batch 128 --rows 8

The terms are measured whole at `--batch`, forward and backward, with teachers 512 and 768 wide: CUSA with `csa` and `usa` less CUSA with
its ranking term alone. The step of the towers (random weights, 224 pixels, 77 tokens, Adam) is measured at `--rows` pairs and
multiplied: its products grow with the pairs, and Adam's share, which does not, is taken once. CPU seconds of one thread, medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from itm.methods.cusa import CUSA
from itm.types import Batch, Captions, Encoded, Images, Matcher, SoftLabels
from tests.support.bench_index import median

WIDTH, TEACHERS, TOKENS = 512, (512, 768), 77


class Vectors(Matcher):
    """A dual encoder without towers: its vectors are its weights."""

    kind = "vectors"
    vector_width = WIDTH

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.image, self.text = (nn.Parameter(nn.functional.normalize(torch.randn(rows, WIDTH), dim=1)) for _ in range(2))

    def encode_images(self, images: Images) -> Encoded:
        return Encoded(vector=self.image)

    def encode_captions(self, captions: Captions) -> Encoded:
        return Encoded(vector=self.text)

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        assert images.vector is not None
        assert captions.vector is not None
        return images.vector @ captions.vector.T


def batch_of(rows: int) -> Batch:
    own = torch.arange(rows)
    captions = Captions(torch.ones(rows, 3, dtype=torch.long), torch.ones(rows, 3, dtype=torch.bool), own)
    return Batch(Images(own, pixels=torch.zeros(rows, 3, 2, 2)), captions, SoftLabels(*(torch.randn(rows, width) for width in TEACHERS)))


def terms(rows: int, on: bool) -> Callable[[], None]:
    """One forward and backward pass of CUSA's terms, with soft labels or without."""
    method, batch = CUSA(Vectors(rows), itc={}, csa=on, usa=on), batch_of(rows)
    method.train()
    return lambda: torch.stack(list(method(batch).values())).sum().backward()


def towers(rows: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(forward and backward pass of both towers, the step of Adam)."""
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig())
    pixels, tokens = torch.randn(rows, 3, 224, 224), torch.randint(1, 49000, (rows, TOKENS))
    optimizer = torch.optim.Adam(model.parameters())
    return lambda: model(input_ids=tokens, pixel_values=pixels, return_loss=True).loss.backward(), optimizer.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    soft = median(terms(args.batch, True), 10 * args.rounds) - median(terms(args.batch, False), 10 * args.rounds)
    both, adam = (median(work, args.rounds) for work in towers(args.rows))
    step = both * args.batch / args.rows + adam
    print(
        f"soft labels {soft * 1e3:.1f} CPU-ms of {args.batch} pairs; a step {step:.1f} CPU-s (towers of {args.rows} pairs {both:.2f}, "
        f"Adam {adam:.2f}): {soft / step:.2%}"
    )


if __name__ == "__main__":
    main()
