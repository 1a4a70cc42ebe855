"""DDP that looks for parameters without gradient, a walk over the graph and a message a step, only where there may be one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from itm.distributed import all_reduce_sum
from itm.precision import lowered
from itm.training.step import Step
from itm.types import Batch

STEADY = ("itm", "torch", "transformers")
"""Packages whose modules give gradients to the same parameters whatever the number of the step and its batch."""


class RankedStep(Step):
    """A `Step` of several ranks; its first call finds out which parameters the losses reach, and wraps the method accordingly."""

    def _step(self, batches: Sequence[Batch], number: int) -> dict[str, Tensor]:
        if self.method is self.plain:
            search = not steady(self.plain) or self._leaves_some(batches[0], number)
            self.method = DistributedDataParallel(self.plain, find_unused_parameters=search)
        return super()._step(batches, number)

    def _leaves_some(self, batch: Batch, number: int) -> bool:
        """Whether any rank's losses leave a parameter without gradient. A copy is tried, since a pass moves running statistics."""
        method = copy.deepcopy(self.plain).train()
        with lowered(self.precision, self.device):
            losses = method(self.mover(batch), step=number, chunk=self.train.cache_chunk)
        left = {id(p) for p in method.parameters() if p.requires_grad} - {id(p) for p in reached(losses.values())}
        return bool(all_reduce_sum(torch.tensor(float(len(left)), device=self.device)) > 0)


def steady(method: nn.Module) -> bool:
    """Whether all its parts are of packages known to be steady; a part of the user's own may leave out other parameters at each step."""
    return all(type(module).__module__.partition(".")[0] in STEADY for module in method.modules())


def reached(losses: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that get a gradient from one of the losses."""
    nodes = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    met, leaves = set(nodes), []
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        new = {after for after, _ in node.next_functions if after is not None} - met
        met |= new
        nodes += new
    return leaves
