"""A linear method and its steps, for tests of the loop and of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from itm.config import Train
from itm.training.loop import Hooks
from itm.training.optim import build_optimizer, moving_average
from itm.training.step import Step
from itm.types import Batch, Captions, Images


class Dot(nn.Module):
    """A method with dropout, two named losses and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(12, 4), nn.Embedding(10, 4)
        self.drop = nn.Dropout(0.5)
        self.tau = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: Batch, step: int = 0, chunk: int | None = None) -> dict[str, Tensor]:
        assert batch.images.pixels is not None
        image = self.image(batch.images.pixels.flatten(1) / 255.0)
        text = self.drop(self.text(batch.captions.tokens).mean(1))
        return {"pull": (image - text).pow(2).mean(), "norm": 0.1 * self.tau * image.pow(2).mean()}


def batch(seed: int, rows: int = 4) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.arange(rows)
    pixels = torch.randint(0, 256, (rows, 3, 2, 2), generator=g, dtype=torch.uint8)
    tokens = torch.randint(0, 10, (rows, 3), generator=g)
    return Batch(Images(ids, pixels=pixels), Captions(tokens, torch.ones_like(tokens, dtype=torch.bool), ids))


def stepper(train: Train | None = None, seed: int = 0, drop: float = 0.5) -> Step:
    train = train or Train(lr=0.01)
    torch.manual_seed(seed)
    method = Dot()
    method.drop.p = drop
    average = moving_average(method, train.ema) if train.ema else None
    return Step(method, build_optimizer(method, train), train, lambda step: train.lr / (step + 1), average, seed)


def batches(first: int, last: int) -> Iterator[Batch]:
    return (batch(number) for number in range(first, last))


def silent(**given: Any) -> Hooks:
    return Hooks(log=lambda done, values: None, **given)


def weights(step: Step) -> Tensor:
    return torch.cat([p.detach().flatten() for p in step.plain.parameters()])
