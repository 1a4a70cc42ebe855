"""torch.compile of the encoders, layer by layer and in place: names of weights stay, and like layers share one graph for all shapes.

The loss stays as it is, since its shapes are ragged. Dropout draws other units than uncompiled code does, from the same seeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from itm.matchers.encoders.build import joint_layers, layers_of, towers_of

BACKEND = "inductor"


def compile_encoders(matcher: nn.Module) -> None:
    """To be called after `recompute_activations`. Copies of the matcher are not compiled."""
    # Rows that happen to be as many as words would get a graph for just that case, and a recomputation might find another one than its
    # first pass did.
    torch.fx.experimental._config.use_duck_shape = False
    for module in _compilable(matcher):
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


def _compilable(matcher: nn.Module) -> Iterator[nn.Module]:
    """Not recurrent towers, whose packed sequences torch.compile does not trace, nor the recomputation of batch norms."""
    for layer in joint_layers(matcher):
        yield from (layer.attention, layer.intermediate, layer.output)
    for tower in towers_of(matcher):
        if layers := layers_of(tower):
            yield from layers
        elif not any(isinstance(m, nn.RNNBase) or (isinstance(m, _BatchNorm) and "forward" in vars(tower)) for m in tower.modules()):
            yield tower
