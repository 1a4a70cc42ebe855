"""One optimiser step: forward, backward, clip, update. A pure function of (weights, optimiser state, batches, step number)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from itm.config import Train
from itm.data.moving import Mover
from itm.device import sized_by
from itm.distributed import rank
from itm.precision import lowered, products, repeatable, resolve_precision
from itm.training.freezing import held_towers
from itm.training.optim import own_kernels, set_rate
from itm.types import Batch, Options

_SMALLER = (
    " with twice train.accumulate, or keep the batch and set train.cache_chunk to a fraction of it, "
    "train.checkpoint_activations=true or train.precision=bf16"
)


class Step:
    """`step(batches, number) -> named losses` (detached, their mean over micro-steps, with the sum as `loss`).

    method: the module itself or DDP around it; rate: step number -> learning rate.
    """

    def __init__(
        self, method: nn.Module, optimizer: Optimizer, train: Train, rate: Callable[[int], float], average: AveragedModel | None, seed: int
    ) -> None:
        self.method, self.optimizer, self.train, self.rate, self.average, self.seed = method, optimizer, train, rate, average, seed
        self.plain: nn.Module = method.module if isinstance(method, DistributedDataParallel) else method
        self.device = next(method.parameters()).device
        self.precision = resolve_precision(train.precision, self.device)
        self.mover = Mover(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def __call__(self, batches: Sequence[Batch], number: int) -> dict[str, Tensor]:
        with products(self.precision), repeatable(self.train.deterministic), sized_by("train.batch_size", self.train.batch_size, _SMALLER):
            return self._step(batches, number)

    def _step(self, batches: Sequence[Batch], number: int) -> dict[str, Tensor]:
        # Dropout and sampling draw from a stream of their own each step: a resumed run needs no saved generator.
        torch.manual_seed(_stream(self.seed, number, rank()))
        self.method.train()
        held = held_towers(self.plain, self.train, number)
        for tower in held:
            tower.eval()
        set_rate(self.optimizer, self.rate(number))
        self.optimizer.zero_grad(set_to_none=True)
        seen: dict[str, Tensor] = {}
        shares: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            with self._synchronised(micro == len(batches) - 1):
                losses = self._losses(self.mover(batch), number)
                if micro == 0 and self.train.log_shares and (number + 1) % self.train.log_every == 0:
                    shares = gradient_shares(losses, self.plain)
                self.scaler.scale(torch.stack(list(losses.values())).sum().div(len(batches))).backward()
            for name, value in losses.items():
                seen[name] = seen.get(name, 0) + value.detach() / len(batches)
        for weight in (weight for tower in held for weight in tower.parameters()):
            weight.grad = None
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        self._finish_gradients()
        self.scaler.step(self.optimizer)  # a step whose gradients overflow is left out, and the scale lowered
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.plain)
        return seen | {"loss": torch.stack(list(seen.values())).sum()} | shares

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint keeps, by the names of its files."""
        return {"model": self.plain} if self.average is None else {"model": self.plain, "average": self.average.module}

    @property
    def kept(self) -> str:
        """Which of the modules is validated and kept in the end."""
        return list(self.modules)[-1]

    def gathered(self, kind: str) -> nn.Module:
        """One of the modules with whole weights, for rank 0 alone. Where weights are sharded all ranks must call this and the next ones."""
        return self.modules[kind]

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The kept module with whole weights on the device, for rank 0 alone."""
        yield self.modules[self.kept]

    def load(self, kind: str, read: Callable[[nn.Module], None]) -> None:
        """`read` fills a module with whole weights."""
        read(self.modules[kind])

    def optimizer_state(self) -> Options:
        """The optimiser's state dict with whole tensors, for rank 0 alone; with fp16 also the scale of the losses."""
        scale = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        return self.optimizer.state_dict() | scale

    def load_optimizer_state(self, saved: Options) -> None:
        saved = dict(saved)
        if scale := saved.pop("scaler", None):
            self.scaler.load_state_dict(scale)
        self.optimizer.load_state_dict(own_kernels(saved, self.optimizer))

    def _finish_gradients(self) -> None:
        if self.train.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.plain.parameters(), self.train.clip_norm)

    def _losses(self, batch: Batch, number: int) -> dict[str, Tensor]:
        with lowered(self.precision, self.device):
            losses: dict[str, Tensor] = self.method(batch, step=number, chunk=self.train.cache_chunk)
        return {name: value.float() for name, value in losses.items()}

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Under DDP, gradients are averaged over ranks in the last micro-step only."""
        return contextlib.nullcontext() if last or not isinstance(self.method, DistributedDataParallel) else self.method.no_sync()


def gradient_shares(losses: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """`share_<loss>`: the norm of its own gradient over all weights, divided by the sum of those norms. The graph stays as it is."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    norms = {}
    for name, loss in losses.items():
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) if loss.requires_grad else ()
        norms[name] = torch.stack([g.float().norm() for g in found if g is not None] or [loss.new_zeros(())]).norm()
    total = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {f"share_{name}": norm / total for name, norm in norms.items()}


def _stream(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest(), "big")
