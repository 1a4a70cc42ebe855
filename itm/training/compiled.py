"""torch.compile of the encoders, layer by layer and in place: names of weights stay, and like layers share one graph for all shapes.

The loss stays as it is, since its shapes are ragged. Dropout draws other units than uncompiled code does, from the same seeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from itm.device import keep_kernels_apart
from itm.matchers.encoders.build import layers_of
from itm.types import Matcher

BACKEND = "inductor"


def compile_encoders(matcher: Matcher, run_again: Collection[nn.Module] = ()) -> None:
    """run_again: what `recompute_activations` gave. Copies of the matcher are not compiled. Raises ValueError for a matcher that declares
    no layers."""
    if not matcher.layers():
        raise ValueError(f"train.compile: matcher {matcher.kind!r} declares no layers() to compile; unset it")
    # Rows that happen to be as many as words would get a graph for just that case, and a recomputation might find another one than its
    # first pass did.
    torch.fx.experimental._config.use_duck_shape = False
    keep_kernels_apart()
    for module in _compilable(matcher, run_again):
        module.compile(dynamic=True, backend=BACKEND)


def check_compiler(device: torch.device) -> None:
    """Raises ValueError when torch.compile has no C++ compiler for a CPU."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        raise ValueError("torch.compile needs a C++ compiler: install g++, name another one in CXX, or switch compile off") from None


def as_written(compiled: bool) -> contextlib.AbstractContextManager[object]:
    """Inside, what is compiled runs uncompiled: validation sees what a loaded matcher gives, and has no graphs of its own."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def _compilable(matcher: Matcher, run_again: Collection[nn.Module]) -> Iterator[nn.Module]:
    """Not recurrent towers, whose packed sequences torch.compile does not trace, nor the recomputation of batch norms."""
    for layer in matcher.layers():
        if inner := layers_of(layer):
            yield from inner
        elif not any(isinstance(m, nn.RNNBase) or (isinstance(m, _BatchNorm) and layer in run_again) for m in layer.modules()):
            yield layer
