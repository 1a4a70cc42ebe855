"""Gradient checkpointing: activations of the encoders are dropped after the forward pass and made again, layer by layer, in the backward
pass. Gradients, dropout and running statistics are those of a run without it; the price is a second forward pass of the encoders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from itm.matchers.chunked import seen_by_checkpoint
from itm.matchers.encoders.build import keep_less
from itm.types import Matcher


def recompute_activations(matcher: Matcher) -> set[nn.Module]:
    """Switch it on, in place: for the layers of a matcher, layer by layer inside a Hugging Face tower, and for the chunks in which SGR,
    SAF and UNITER score. What has no trainable weights keeps nothing and stays as it is.

    Returns the modules that are now run again as a whole. Raises ValueError for a matcher that declares no layers.
    """
    layers = matcher.layers()
    if not layers:
        raise ValueError(f"train.checkpoint_activations: matcher {matcher.kind!r} declares no layers() to run again; unset it")
    matcher.recompute = True
    again = set()
    for layer in layers:
        if any(p.requires_grad for p in layer.parameters()) and not keep_less(layer):
            _recompute(layer)
            again.add(layer)
    return again


def _recompute(module: nn.Module) -> None:
    """On the instance: a copy of the module calls its own method, since deepcopy follows bound methods."""
    run, norms = module.forward, [m for m in module.modules() if isinstance(m, _BatchNorm)]
    module.forward = partial(_again_at_rest, norms, run) if norms else partial(_again, run)


def _again(run: Callable[..., object], *given: object, **named: object) -> object:
    return seen_by_checkpoint(partial(run, **named), *given) if torch.is_grad_enabled() else run(*given, **named)


def _again_at_rest(norms: list[_BatchNorm], run: Callable[..., object], *given: object, **named: object) -> object:
    if not torch.is_grad_enabled():
        return run(*given, **named)
    return seen_by_checkpoint(partial(run, **named), *given, context_fn=lambda: (contextlib.nullcontext(), _at_rest(norms)))


@contextlib.contextmanager
def _at_rest(norms: list[_BatchNorm]) -> Iterator[None]:
    """The second pass normalises by the batch as the first did, but does not move the running statistics once more."""
    moved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, moved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
