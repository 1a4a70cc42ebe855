"""Plain matching: one ranking loss (contrastive or triplet) on the scores of a batch, for any matcher."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from itm.config import Strict
from itm.distributed import gather_ragged_rows, gather_rows, rank, world_size
from itm.losses.contrastive import Reduction, contrastive_loss
from itm.losses.triplet import triplet_loss
from itm.types import Batch, Encoded, positives_from_ids

Gather = bool | Literal["official"]
FLAT_STEPS = 50


class ContrastiveOptions(Strict):
    """`tau` is learned unless learn_tau is false and clamped into tau_range at the start of every forward pass."""

    weight: float = 1.0
    tau: float = 0.05
    tau_range: tuple[float, float] | None = None
    learn_tau: bool = True
    reduction: Reduction = "mean"


class TripletOptions(Strict):
    """The first `warmup_steps` steps use all negatives instead of the hardest one. `official`: see `triplet_loss`."""

    weight: float = 1.0
    margin: float = 0.2
    hardest: bool = True
    warmup_steps: int = 0
    official: bool = False


def read_options(model: type[Strict], options: dict[str, Any], what: str) -> Any:
    """Raises ValueError naming each unknown or wrong option and the known ones."""
    try:
        return model(**options)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{what}: {problems}. Options: {', '.join(model.model_fields)}") from None


def widened(given: tuple[float, float] | None, default: tuple[float, float], start: float) -> tuple[float, float]:
    """The clamp of a temperature: as given, else the default one stretched to hold the start value.

    Raises ValueError unless 0 < low <= high.
    """
    low, high = given or (min(default[0], start), max(default[1], start))
    if not 0 < low <= high:
        raise ValueError(f"a temperature must stay above 0: clamp {low}..{high}, start {start}")
    return low, high


class ContrastiveTerm(nn.Module):
    """weight * contrastive_loss with a temperature of its own (docs/methods/dual.md#contrastive-loss)."""

    def __init__(self, options: ContrastiveOptions) -> None:
        super().__init__()
        self.options = options
        self.range = widened(options.tau_range, (0.01, 0.1), options.tau)
        self.tau = nn.Parameter(torch.tensor(options.tau), requires_grad=options.learn_tau)

    @torch.no_grad()
    def clamp_(self) -> None:
        self.tau.clamp_(*self.range)

    def forward(self, scores: Tensor, positives: Tensor) -> Tensor:
        return self.options.weight * contrastive_loss(scores, self.tau, positives, reduction=self.options.reduction)


class TripletTerm(nn.Module):
    """weight * triplet_loss, and a warning when the model has collapsed."""

    flat_steps: Tensor

    def __init__(self, options: TripletOptions) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("flat_steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.reported = False

    def forward(self, scores: Tensor, positives: Tensor, step: int) -> Tensor:
        o = self.options
        self._watch(scores.detach(), step)
        hardest = o.hardest and step >= o.warmup_steps
        return o.weight * triplet_loss(scores, positives, margin=o.margin, hardest=hardest, official=o.official)

    def _watch(self, scores: Tensor, step: int) -> None:
        """Scores that differ only by image, only by caption, or not at all hold the hardest-negative loss at the margin for every query.

        The device is asked only now and then; the warning comes once.
        """
        spread = torch.minimum(*((scores.amax(side) - scores.amin(side)).amax() for side in (0, 1)))
        self.flat_steps = torch.where(spread < self.options.margin / 10, self.flat_steps + 1, 0)
        if not self.reported and step % FLAT_STEPS == FLAT_STEPS - 1 and int(self.flat_steps) >= FLAT_STEPS:
            self.reported = True
            warnings.warn(
                f"all scores of an image or a caption have been equal for {FLAT_STEPS} steps: the triplet loss is stuck at the margin (2 x "
                f"{self.options.margin} a pair). Start again with warmup_steps (all negatives first) or a smaller train.lr."
            )


class Matching(nn.Module):
    """`loss`: contrastive (options: `ContrastiveOptions`) or triplet (options: `TripletOptions`).

    gather: scores over the batches of all ranks, with the gradient of one process on the concatenated batch after DDP's mean.
    Differs from CUSA's ITC in one default: reduction `sum`, the usual InfoNCE.
    """

    needs_teacher: tuple[str, ...] = ()

    def __init__(
        self, matcher: nn.Module, *, loss: Literal["contrastive", "triplet"] = "contrastive", gather: bool = False, **options: Any
    ) -> None:
        """Raises ValueError for an unknown loss or option."""
        super().__init__()
        self.matcher = matcher
        self.loss, self.gather = loss, gather
        self.term: ContrastiveTerm | TripletTerm
        if loss == "contrastive":
            self.term = ContrastiveTerm(read_options(ContrastiveOptions, {"reduction": "sum", **options}, "method matching, contrastive"))
        elif loss == "triplet":
            self.term = TripletTerm(read_options(TripletOptions, options, "method matching, triplet"))
        else:
            raise ValueError(f"method matching: loss is contrastive or triplet, not {loss!r}")

    def forward(self, batch: Batch, step: int = 0) -> dict[str, Tensor]:
        """{"contrastive" | "triplet": scalar}, and what the matcher adds (see `auxiliary_losses`)."""
        if isinstance(self.term, ContrastiveTerm):
            self.term.clamp_()
        images, captions = encode(self.matcher, batch, self.gather)
        scores = self.matcher.score(images, captions)  # type: ignore[operator]
        positives = batch_positives(batch, self.gather)
        loss = self.term(scores, positives) if isinstance(self.term, ContrastiveTerm) else self.term(scores, positives, step)
        return {self.loss: loss, **auxiliary_losses(self.matcher, positives)}


def encode(matcher: Any, batch: Batch, gather: Gather) -> tuple[Encoded, Encoded]:
    """Both sides of a batch; with `gather` the rows of all ranks in rank order."""
    return gather_encoded(matcher.encode_images(batch.images), gather), gather_encoded(matcher.encode_captions(batch.captions), gather)


def auxiliary_losses(matcher: nn.Module, positives: Tensor) -> dict[str, Tensor]:
    """The terms a matcher adds in training, after `score` (UARDA: its thresholds move, its classes are separated); {} for others."""
    hook = getattr(matcher, "auxiliary_losses", None)
    return hook(positives) if hook is not None and matcher.training else {}


def batch_positives(batch: Batch, gather: Gather) -> Tensor:
    """(I,T) bool from the image ids, of all ranks with `gather`."""
    ids = batch.images.image_id, batch.captions.image_id
    return positives_from_ids(*(gather_rows(i) if gather else i for i in ids))


def gather_encoded(encoded: Encoded, gather: Gather) -> Encoded:
    """True: gradient of every rank's loss (one-process gradient after DDP's mean). `official`: only the own loss's gradient of the own
    rows (docs/methods/cusa.md#several-ranks), so network gradients are 1/W of the one-process ones after DDP's mean. Ranks hold equally
    many rows."""
    if not gather or world_size() == 1:
        return encoded
    names = [name for name in ("vector", "parts", "mask", "uni") if getattr(encoded, name) is not None]
    return Encoded(**{name: _gather(getattr(encoded, name), name in ("parts", "mask"), gather) for name in names})


def _gather(x: Tensor, ragged: bool, gather: Gather) -> Tensor:
    collect = gather_ragged_rows if ragged else gather_rows
    if gather != "official" or not x.is_floating_point():
        return collect(x)
    everyone = collect(x.detach())
    own = F.pad(x, (0, 0, 0, everyone.shape[1] - x.shape[1])) if ragged else x
    start = rank() * len(x)
    return torch.cat([everyone[:start], own, everyone[start + len(x) :]])
