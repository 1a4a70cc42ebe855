"""UARDA's relevance threshold: the boundary between two Gaussians of least misclassification cost, and how it follows training.

Similarities of matched word-region maxima are N(mu+, sd+), of mismatched ones N(mu-, sd-).
Formulas: docs/methods/uarda.md#closed-form and docs/methods/uarda.md#update-rule.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from itm.config import Strict
from itm.distributed import all_reduce_sum

Number = Any  # float, numpy array or tensor


def relevance_threshold(mu_pos: Number, sigma_pos: Number, mu_neg: Number, sigma_neg: Number, alpha: Number = 2.0) -> Tensor:
    """The t in [0,1] of least `misclassification_cost`: float64 tensor of the broadcast shape, differentiable at interior optima.

    The one root of f+(t) = alpha f-(t) that is a local minimum, in its stable form, against both bounds by cost with erfc; ties go to the
    root, then to 0. A result strictly between 0 and 1 is interior; elsewhere the gradient is 0. Raises ValueError for sigma or alpha <= 0.
    """
    given = (mu_pos, sigma_pos, mu_neg, sigma_neg, alpha)
    device = next((x.device for x in given if isinstance(x, Tensor)), None)
    values = [torch.as_tensor(x, dtype=torch.float64, device=device) for x in given]
    mp, sp, mn, sn, a = torch.broadcast_tensors(*values)
    if bool((torch.stack([sp, sn, a]) <= 0).any()):
        raise ValueError("relevance_threshold needs standard deviations and alpha above 0")
    return _Threshold.apply(mp, sp, mn, sn, a)


def misclassification_cost(t: Tensor, mp: Tensor, sp: Tensor, mn: Tensor, sn: Tensor, alpha: Tensor) -> Tensor:
    """C(t) = alpha P(N(mu-,sd-) > t) + P(N(mu+,sd+) < t); both tails by erfc."""
    root = math.sqrt(2.0)
    return alpha * torch.erfc((t - mn) / (sn * root)) / 2 + torch.erfc((mp - t) / (sp * root)) / 2


def local_minimum(mp: Tensor, sp: Tensor, mn: Tensor, sn: Tensor, alpha: Tensor) -> Tensor:
    """The local minimum of C on the whole real line, NaN where there is none: A t^2 + B t + C0 = 0 at its rising root."""
    a = (sp - sn) * (sp + sn)
    b = 2 * (mp * sn**2 - mn * sp**2)
    c = (sp * mn - sn * mp) * (sp * mn + sn * mp) + 2 * (sp * sn) ** 2 * torch.log(sn / (alpha * sp))
    e = b**2 - 4 * a * c
    root = e.clamp(min=0).sqrt()
    t = torch.where(b >= 0, -2 * c / (b + root), (root - b) / (2 * a))
    return torch.where((e > 0) & ((b >= 0) | (a != 0)), t, torch.nan)


class _Threshold(torch.autograd.Function):
    """Implicit gradient dt/dx = -g_x / g_t with g = ln f+ - ln(alpha f-) (docs/methods/uarda.md#gradients-of-the-threshold)."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        t = local_minimum(*given)
        inside = (t > 0) & (t < 1)
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        best = torch.where(inside, t, zero)
        for bound in (zero, one):
            best = torch.where(misclassification_cost(bound, *given) < misclassification_cost(best, *given), bound, best)
        ctx.save_for_backward(best, *given)
        return best

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        t, mp, sp, mn, sn, alpha = ctx.saved_tensors
        slope = (t - mn) / sn**2 - (t - mp) / sp**2
        partial = (
            (t - mp) / sp**2,
            -1 / sp + (t - mp) ** 2 / sp**3,
            -(t - mn) / sn**2,
            1 / sn - (t - mn) ** 2 / sn**3,
            -1 / alpha,
        )
        interior = (t > 0) & (t < 1)
        return tuple(torch.where(interior, -grad * g / slope, 0.0) for g in partial)


class ThresholdOptions(Strict):
    """alpha: cost of an irrelevant pair taken as relevant. mismatch: which wrong item gives the negative sample.

    min_words: fewer matched samples over all ranks leave t as it is. kappa: t never passes mu+ - kappa sd+. keep: share of the old t.
    warmup_steps: t stays 0 for so many training steps. mode naaf_compat updates within the batch, caption by caption, as NAAF's code.
    """

    alpha: float = 2.0
    mismatch: Literal["random", "easiest", "hardest"] = "random"
    min_words: int = 200
    kappa: float = 1.0
    keep: float = 0.3
    warmup_steps: int = 0
    mode: Literal["batch", "naaf_compat"] = "batch"


class RelevanceThreshold(nn.Module):
    """The state of one direction, all buffers: t, t_safe, the last mu+, sd+, mu-, sd-, counts, pruned shares (matched, mismatched)."""

    t: Tensor
    t_safe: Tensor
    statistics: Tensor
    steps: Tensor
    updates: Tensor
    pruned: Tensor

    def __init__(self, options: ThresholdOptions) -> None:
        super().__init__()
        self.options = options
        for name, size in (("t", ()), ("t_safe", ()), ("statistics", (4,)), ("pruned", (2,))):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        for name in ("steps", "updates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def in_force(self, evaluated_at: Literal["t", "t_safe"] | float | None) -> Tensor | float:
        """The threshold to score with: t in training (None), else the one that was chosen for evaluation."""
        if evaluated_at is None or evaluated_at == "t":
            return self.t.clone()
        return self.t_safe if evaluated_at == "t_safe" else float(evaluated_at)

    @torch.no_grad()
    def saw(self, matched: Tensor, mismatched: Tensor) -> None:
        """Note which share of either the threshold in force prunes."""
        self.pruned.copy_(torch.stack([(x <= self.t).double().mean() for x in (matched, mismatched)]))

    @torch.no_grad()
    def update(self, matched: Tensor, mismatched: Tensor, everywhere: bool = False) -> None:
        """One training step (docs/methods/uarda.md#update-rule, steps 3 to 5). matched, mismatched (n,): row maxima of this rank.

        `everywhere` says that every rank passes the samples of all ranks already. The new t holds from the next step on.
        """
        o = self.options
        sums = torch.stack([_sums(matched), _sums(mismatched)])
        sums = sums if everywhere else all_reduce_sum(sums)
        (n, mp, sp), (_, mn, sn) = _moments(sums[0]), _moments(sums[1])
        enough = n >= max(o.min_words, 2)
        best = _proposed(mp, sp, mn, sn, o)
        self.steps += 1
        self.updates += enough
        safe = (mp - 3 * sp).clamp(0, 1)
        self.t.copy_(torch.where(enough, (1 - o.keep) * best + o.keep * self.t, self.t) * (self.steps > o.warmup_steps))
        self.t_safe.copy_(torch.where(enough, (1 - o.keep) * safe + o.keep * self.t_safe, self.t_safe))
        self.statistics.copy_(torch.where(enough, torch.stack([mp, sp, mn, sn]), self.statistics))

    def followed(self, matched: Tensor, mismatched: Tensor) -> Tensor:
        """t in force, with the gradient that what `update` makes of these samples has in them: (1 - keep) dt/dx, 0 where t does not move.

        docs/methods/uarda.md#implicit-gradient. matched, mismatched (n,): row maxima of this rank, with gradient.
        """
        (n, mp, sp), (_, mn, sn) = _moments(_sums(matched)), _moments(_sums(mismatched))
        best = (1 - self.options.keep) * _proposed(mp, sp, mn, sn, self.options)
        moves = (n >= max(self.options.min_words, 2)) & (self.steps >= self.options.warmup_steps)
        return self.t + torch.where(moves, best - best.detach(), 0.0)

    def report(self) -> dict[str, float]:
        """What to log: t, t_safe, mu_pos, sigma_pos, mu_neg, sigma_neg, updates, pruned_matched, pruned_mismatched."""
        names = ("mu_pos", "sigma_pos", "mu_neg", "sigma_neg")
        found = {"t": self.t, "t_safe": self.t_safe, **dict(zip(names, self.statistics, strict=True)), "updates": self.updates}
        found |= {"pruned_matched": self.pruned[0], "pruned_mismatched": self.pruned[1]}
        return {name: float(value) for name, value in found.items()}


def _proposed(mp: Tensor, sp: Tensor, mn: Tensor, sn: Tensor, o: ThresholdOptions) -> Tensor:
    """Step 4 of the update rule: the interior optimum or 0, at most kappa deviations below mu+. Deviations are above 0 (`_moments`)."""
    best = _Threshold.apply(mp, sp, mn, sn, torch.full_like(mp, o.alpha))
    best = torch.where((best > 0) & (best < 1) & (mp > mn), best, 0.0)
    return torch.minimum(best, (mp - o.kappa * sp).clamp(min=0))


def _sums(x: Tensor) -> Tensor:
    x = x.to(torch.float64)
    return torch.stack([torch.full_like(total := x.sum(), x.numel()), total, x.square().sum()])


def _moments(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, mean, standard deviation with n-1, at least 1e-4)."""
    n, total, squares = sums
    mean = total / n.clamp(min=1)
    return n, mean, ((squares - n * mean**2) / (n - 1).clamp(min=1)).clamp(min=1e-8).sqrt()
