"""Optimiser, learning-rate schedules and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Adam, Adamax, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from itm.config import Train
from itm.training.freezing import rate_scales
from itm.types import Method, Options, Reports


class UniterAdamW(AdamW):
    """AdamW as UNITER's code has it: eps joins the root before its bias is corrected, and the decay follows the update.

    docs/methods/iais.md#schedule.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss is measured again
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: Options) -> None:
        state, (first, second) = self.state[weight], group["betas"]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        state["step"] += 1
        done = float(state["step"])
        state["exp_avg"].mul_(first).add_(weight.grad, alpha=1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
        rate = group["lr"] * math.sqrt(1 - second**done) / (1 - first**done)
        weight.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-rate)
        if group["weight_decay"]:
            weight.add_(weight, alpha=-group["lr"] * group["weight_decay"])


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": Adam, "adamw": AdamW, "adamax": Adamax, "adamw_uniter": UniterAdamW}


def _is_bias(name: str) -> bool:
    return name.split(".")[-1].startswith("bias")


UNDECAYED: dict[str, Callable[[str, Tensor], bool]] = {
    "matrices": lambda name, weight: weight.dim() <= 1 or _is_bias(name),
    "cusa": lambda name, weight: weight.dim() == 1 or _is_bias(name),
    "uniter": lambda name, weight: "bias" in name or "LayerNorm.weight" in name,
}
"""train.decayed -> whether a weight has no decay (docs/methods/cusa.md#hyper-parameters, docs/methods/iais.md#schedule)."""


def parameter_groups(
    method: nn.Module, weight_decay: float, decayed: str = "matrices", scales: dict[str, float] | None = None
) -> list[dict[str, object]]:
    """Two groups for each scale of the learning rate, the largest first: with decay, and without. decayed: see `train.decayed`.

    scales: of parameters by name, where it is not 1.
    """
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    of = {name: (scales or {}).get(name, 1.0) for name, _ in named}
    groups: list[dict[str, object]] = []
    for scale in sorted({1.0, *of.values()}, reverse=True):
        some = [(name, p) for name, p in named if of[name] == scale]
        said = {} if scale == 1.0 else {"scale": scale}
        plain = {id(p) for name, p in some if UNDECAYED[decayed](name, p)}
        groups.append({"params": [p for _, p in some if id(p) not in plain], "weight_decay": weight_decay, **said})
        groups.append({"params": [p for _, p in some if id(p) in plain], "weight_decay": 0.0, **said})
    return groups


def build_optimizer(method: nn.Module, train: Train) -> Optimizer:
    scales = rate_scales(method, train) if isinstance(method, Method) else {}
    groups = [g for g in parameter_groups(method, train.weight_decay, train.decayed, scales) if g["params"]]
    # One kernel for all weights instead of a dozen; its last digits are those of a GPU, and CPU runs keep theirs.
    fused: Options = {"fused": True} if train.optimizer in ("adam", "adamw") and next(method.parameters()).is_cuda else {}
    return OPTIMIZERS[train.optimizer](groups, lr=train.lr, betas=train.betas, eps=train.eps, **fused)


def own_kernels(saved: Options, optimizer: Optimizer) -> Options:
    """A saved state with the choice of kernels of this optimiser: a run may go on on another kind of device."""
    groups = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    return saved | {"param_groups": [group | {k: own[k] for k in ("fused", "foreach") if k in own} for group, own in groups]}


def learning_rate(train: Train, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The rate of optimiser step `step` (0-based); never 0 but 1e-8, as UNITER has it.

    During the first W = warmup_steps it rises as lr (step+1)/W. Then, with s = (step-W) / (total-W), e = epoch of the step, E = epochs:
    constant lr; linear lr + (min-lr) (step+1-W) / (total-W), which ends at min (docs/methods/iais.md#schedule);
    cosine min + (lr-min)(1+cos(pi s))/2;
    cosine_epoch min + (lr-min)(1+cos(pi e/E))/2 (docs/methods/cusa.md#hyper-parameters);
    step lr step_gamma^floor(e / step_epochs) (docs/methods/scan.md#schedule).
    """
    rate = _planned(train, step, steps_per_epoch, total_steps)
    return rate if rate > 0 else 1e-8


def _planned(train: Train, step: int, steps_per_epoch: int, total_steps: int) -> float:
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    falling = max(1, total_steps - train.warmup_steps)
    done = min(1.0, (step - train.warmup_steps) / falling)
    epoch, epochs = step // steps_per_epoch, max(1, math.ceil(total_steps / steps_per_epoch))
    span = train.lr - train.min_lr
    match train.schedule:
        case "cosine":
            return train.min_lr + span * 0.5 * (1 + math.cos(math.pi * done))
        case "cosine_epoch":
            return train.min_lr + span * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        case "linear":
            return train.min_lr + span * max(0, total_steps - step - 1) / falling
        case "step":
            return max(train.min_lr, train.lr * train.step_gamma ** (epoch // train.step_epochs))
        case _:
            return train.lr


def set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def moving_average(method: nn.Module, decay: float) -> AveragedModel:
    """w_ema = decay w_ema + (1 - decay) w after each step, buffers too; it starts from the weights after the first step."""
    return AveragedModel(method, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def scalars(method: nn.Module) -> Iterator[tuple[str, float]]:
    """(name, value) of what is worth a curve: 0-D parameters (temperatures), and what modules with a `report` tell (thresholds)."""
    for name, parameter in method.named_parameters():
        if parameter.dim() == 0:
            yield name, parameter.item()
    for name, module in method.named_modules():
        if isinstance(module, Reports):
            yield from ((f"{name}.{key}", value) for key, value in module.report().items())
