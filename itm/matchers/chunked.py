"""Encoding in chunks whose activations are dropped and made again in the backward pass.

torch.utils.checkpoint puts the random generators back for the second pass, so dropout drops the same units (GradCache, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from itm.rows import Rows
from itm.types import Encoded

Given = TypeVar("Given", bound=Rows)
Made = TypeVar("Made")


def encode_in_chunks(encode: Callable[[Given], Encoded], rows: Given, chunk: int | None) -> Encoded:
    """`encode(rows)`, `chunk` rows at a time without keeping activations; None: as it is."""
    if chunk is None:
        return encode(rows)
    return Encoded.cat([seen_by_checkpoint(encode, rows[own]) for own in slices(len(rows), chunk)])


def slices(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, rows, chunk))


def seen_by_checkpoint(run: Callable[..., Made], *given: object, **options: Any) -> Made:
    """`checkpoint` puts back the generators of the devices of the tensors that it is given, and does not look into a `Rows`: it gets one
    tensor of each beside it. Without, the second pass on a GPU would drop other units than the first."""
    shown = [next(iter(rows.present().values())) for rows in given if isinstance(rows, Rows)]
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    made: Made = checkpoint(lambda *_: run(*given), *shown, *tensors, use_reentrant=False, **options)
    return made
