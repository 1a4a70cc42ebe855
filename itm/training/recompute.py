"""Gradient checkpointing: activations of the encoders are dropped after the forward pass and made again, layer by layer, in the backward
pass. Gradients, dropout and running statistics are those of a run without it; the price is a second forward pass of the encoders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from itm.matchers.encoders.build import joint_layers, towers_of
from itm.training.cached import seen_by_checkpoint


def recompute_activations(matcher: nn.Module) -> None:
    """Switch it on, in place: every layer of a Hugging Face tower and of a joint encoder, any other tower as a whole, and the chunks in
    which SGR, SAF and UNITER score. A tower without trainable weights keeps nothing and stays as it is.
    """
    if hasattr(matcher, "recompute"):
        matcher.recompute = True  # type: ignore[assignment]
    for layer in joint_layers(matcher):
        _recompute(layer.attention, "forward")
        _recompute(layer, "feed_forward_chunk")
    for tower in towers_of(matcher):
        model: Any = getattr(tower, "model", tower)
        if not any(p.requires_grad for p in model.parameters()):
            continue
        if getattr(model, "supports_gradient_checkpointing", False):
            model.config.use_cache = False  # of generated text: no encoder has one, but some warn
            # The name of older releases warns in newer ones.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        else:
            _recompute(tower, "forward")


def _recompute(module: nn.Module, name: str) -> None:
    """On the instance: a copy of the module calls its own method, since deepcopy follows bound methods."""
    run, norms = getattr(module, name), [m for m in module.modules() if isinstance(m, _BatchNorm)]
    setattr(module, name, partial(_again_at_rest, norms, run) if norms else partial(_again, run))


def _again(run: Callable[..., Any], *given: Any) -> Any:
    return seen_by_checkpoint(run, *given) if torch.is_grad_enabled() else run(*given)


def _again_at_rest(norms: list[_BatchNorm], run: Callable[..., Any], *given: Any) -> Any:
    if not torch.is_grad_enabled():
        return run(*given)
    return seen_by_checkpoint(run, *given, context_fn=lambda: (contextlib.nullcontext(), _at_rest(norms)))


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
