"""Tiny random batches for the late-interaction tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from itm.types import Captions, Encoded, Images

SMALL: dict[str, Any] = {"vocab_size": 20, "image": {"in_width": 7, "width": 10}, "text": {"word_dim": 6, "width": 10, "dropout": 0.0}}


def images_of(rows: int, regions: int, real: list[int] | None = None) -> Images:
    mask = None if real is None else torch.arange(regions)[None] < torch.tensor(real)[:, None]
    return Images(torch.arange(rows), regions=torch.randn(rows, regions, 7), mask=mask)


def captions_of(lengths: list[int], longest: int | None = None) -> Captions:
    longest = longest or max(lengths)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return Captions(torch.randint(1, 20, (len(lengths), longest)) * mask, mask, torch.arange(len(lengths)))


def encoded(matcher: Any, images: Images, captions: Captions) -> tuple[Encoded, Encoded]:
    return matcher.encode_images(images), matcher.encode_captions(captions)


def scores_of(matcher: Any, images: Images, captions: Captions) -> Tensor:
    return matcher.score(*encoded(matcher, images, captions))


def padded(rows: Encoded, by: int) -> Encoded:
    """The same rows with `by` more padded parts."""
    assert rows.parts is not None and rows.mask is not None
    parts = torch.cat([rows.parts, rows.parts.new_zeros(len(rows), by, rows.parts.shape[2])], 1)
    return Encoded(rows.vector, parts, torch.cat([rows.mask, rows.mask.new_zeros(len(rows), by)], 1))


def gradients(matcher: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    matcher.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in matcher.named_parameters() if p.grad is not None}
