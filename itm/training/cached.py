"""Batches larger than memory holds: rows are encoded in chunks whose activations are dropped and made again, chunk by chunk, in the
backward pass. The loss sees all rows at once, so contrastive, hardest-negative and soft-label losses have the gradients of the big batch.

What is kept is one `Encoded` row each, the scores, and the activations of one chunk; the price is a second forward pass of the encoders.
torch.utils.checkpoint puts the random generators back for the second pass, so dropout drops the same units (GradCache, arXiv 2101.06983).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from itm.types import Captions, Encoded, Images, Rows

_SIDES = ("encode_images", "encode_captions")


@contextlib.contextmanager
def encoding_in_chunks(matcher: Any, chunk: int | None) -> Iterator[None]:
    """Inside, the matcher encodes `chunk` rows at a time and keeps no activations; unset: as it is."""
    if chunk is None:
        yield
        return
    for side in _SIDES:
        setattr(matcher, side, partial(_chunked, getattr(matcher, side), chunk))
    try:
        yield
    finally:
        for side in _SIDES:
            delattr(matcher, side)


def _chunked(encode: Callable[[Any], Encoded], chunk: int, rows: Images | Captions) -> Encoded:
    pieces = [seen_by_checkpoint(encode, rows[start : start + chunk]) for start in range(0, len(rows), chunk)]
    return Encoded.cat(pieces)


def seen_by_checkpoint(run: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """`checkpoint` puts back the generators of the devices of the tensors that it is given, and does not look into a `Rows`: it gets one
    tensor of each beside it. Without, the second pass on a GPU would drop other units than the first."""
    shown = [next(iter(rows._present().values())) for rows in given if isinstance(rows, Rows)]
    return checkpoint(lambda *_: run(*given), *shown, *(x for x in given if isinstance(x, torch.Tensor)), use_reentrant=False, **options)


def check_cached(matcher: nn.Module, images: Images, captions: Captions) -> None:
    """Raises ValueError, with the reason, for a matcher whose rows cannot be encoded apart. images, captions: any two rows, to try it."""
    kind = getattr(matcher, "kind", type(matcher).__name__)
    if hasattr(matcher, "pairs"):
        raise ValueError(
            f"train.cache_chunk: matcher {kind!r} runs its joint encoder for every pair inside the score, so its encodings do not carry "
            "what the score needs and chunks would save nothing; unset it and use train.accumulate"
        )
    met: list[str] = []
    norms = [(name, module) for name, module in matcher.named_modules() if isinstance(module, _BatchNorm)]
    hooks = [module.register_forward_pre_hook(lambda *_, name=name: met.append(name)) for name, module in norms]
    training = matcher.training
    try:
        with torch.no_grad():
            matcher.eval()
            matcher.encode_images(images)  # type: ignore[operator]
            matcher.encode_captions(captions)  # type: ignore[operator]
    finally:
        matcher.train(training)
        for hook in hooks:
            hook.remove()
    if met:
        raise ValueError(
            f"train.cache_chunk: the encoders of matcher {kind!r} use batch norm ({met[0]}), whose statistics would be those of a chunk, "
            "not of the batch; unset it, or choose encoders without batch norm"
        )
