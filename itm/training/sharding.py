"""FSDP2 in the place of DDP: every rank keeps a share of the weights, gradients and optimiser state, and of the moving average.

A layer's weights are gathered while it runs; with bf16 in that format, in half the bytes, while shares and sums of gradients stay float32.
Temperatures and gains (0-D) and buffers are whole on every rank. What is saved is gathered on rank 0 as whole tensors of the ordinary
names, so a checkpoint fits any number of ranks, sharded or not; what is validated, on all of them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from itm.config import Train
from itm.distributed import all_reduce_sum, broadcast, rank, world_size
from itm.matchers.encoders.build import layers_of
from itm.precision import LOW, resolve_precision
from itm.training.optim import build_optimizer, own_kernels
from itm.training.step import Step
from itm.types import Batch, Method, Options


class ShardedStep(Step):
    """A `Step` with the numbers of DDP. Each rank holds one whole copy of the method in main memory, into which rank 0 gathers what is
    saved, and which each fills for a validation."""

    def __init__(self, method: Method, train: Train, rate: Callable[[int], float], seed: int, device: torch.device) -> None:
        """method: whole, the same on all ranks, and not on the device yet, which need not hold all of it."""
        self.copy = copy.deepcopy(method)
        average = AveragedModel(method, avg_fn=get_ema_avg_fn(train.ema), use_buffers=True) if train.ema else None
        low = LOW.get(resolve_precision(train.precision, device))
        _shard(method, device, low)
        if average is not None:
            assert isinstance(average.module, Method)
            _shard(average.module, device, low)
        super().__init__(method, build_optimizer(method, train), train, rate, average, seed)

    def __call__(self, batches: Sequence[Batch], number: int) -> dict[str, Tensor]:
        broadcast(self.plain.buffers())
        return super().__call__(batches, number)

    def gathered(self, kind: str) -> nn.Module:
        weights = get_model_state_dict(self.modules[kind], options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank() > 0:
            return self.modules[kind]
        self.copy.load_state_dict(weights)
        return self.copy

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        self.gathered(self.kept)
        method = self.copy.to(self.device)
        try:
            for value in method.state_dict().values():
                broadcast([value])
            yield method
        finally:
            method.cpu()

    def load(self, kind: str, read: Callable[[nn.Module], None]) -> None:
        if rank() == 0:
            read(self.copy)
        weights = self.copy.state_dict() if rank() == 0 else {}
        set_model_state_dict(self.modules[kind], weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))

    def optimizer_state(self) -> Options:
        saved = self.optimizer.state_dict()
        return saved | {"state": {n: {name: _whole(v) for name, v in state.items()} for n, state in saved["state"].items()}}

    def load_optimizer_state(self, saved: Options) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {n: {name: _share(v, parameters[n]) for name, v in state.items()} for n, state in saved["state"].items()}
        self.optimizer.load_state_dict(own_kernels(saved | {"state": state}, self.optimizer))

    def _finish_gradients(self) -> None:
        """FSDP has averaged what it shards over the ranks; the scalars are left."""
        parameters = [p for p in self.plain.parameters() if p.grad is not None]
        scalars = [p for p in parameters if not isinstance(p, DTensor)]
        if scalars:
            means = all_reduce_sum(torch.stack(_gradients(scalars))) / world_size()
            for parameter, mean in zip(scalars, means, strict=True):
                parameter.grad = mean
        if self.train.clip_norm is not None:
            groups = scalars, [p for p in parameters if isinstance(p, DTensor)]
            norms = [get_total_norm(_gradients(group)) for group in groups if group]
            total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
            for group in groups:
                clip_grads_with_norm_(group, self.train.clip_norm, total)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _shard(method: Method, device: torch.device, low: torch.dtype | None) -> None:
    """Layers, then towers, then what is left; in place. low: what weights are gathered in; inputs are left to autocast."""
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=None if low is None else torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world_size(),))
    scalars = {p for p in method.parameters() if p.dim() == 0}
    groups = [group for layer in method.matcher.layers() for group in (*layers_of(layer), layer)]
    for group in (*groups, method):
        fully_shard(group, mesh=mesh, mp_policy=policy, ignored_params=scalars)
    method.to(device)


def _whole(value: object) -> object:
    """A meeting of the ranks for what is sharded; the whole tensor comes to the main memory of rank 0."""
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if rank() == 0 else None


def _share(value: object, parameter: Tensor) -> object:
    """This rank's share of the optimiser's state of a sharded parameter."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
