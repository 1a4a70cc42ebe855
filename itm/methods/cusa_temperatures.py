"""The temperatures of CUSA's two soft-label terms: student and teacher, each for image and text, some of them borrowed.

Values and clamps: docs/methods/cusa.md#temperatures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from itm.config import Strict
from itm.losses.contrastive import Reduction
from itm.losses.soft_label import Divergence, Mode
from itm.methods.terms import read_options, widened
from itm.types import Options

STUDENT = {"image": 0.45, "text": 0.45, "learn": True}
TEACHER = {"image": 1.0, "text": 1.0, "learn": False}


class TemperatureOptions(Strict):
    """A start value and a clamp per modality. shared: one parameter, start and clamp the means of the two.

    A clamp that is not given is 0.1..0.99 (CSA student) or 0.1..1, stretched to hold the start value.
    """

    image: float
    text: float
    image_range: tuple[float, float] | None = None
    text_range: tuple[float, float] | None = None
    shared: bool
    learn: bool


class CSAOptions(Strict):
    """student, teacher: a number, or `TemperatureOptions`; student may also be "itc" (borrowed). loss, reduction: `soft_label_loss`."""

    weight: float = 0.1
    mode: Mode = "each"
    loss: Divergence = "kl"
    reduction: Reduction = "mean"
    student: object = None
    teacher: object = None


class USAOptions(Strict):
    """student, teacher: as in CSA, or "csa" (borrowed from it). head, width: the layer added when the matcher has no uni head."""

    weight: float = 0.5
    loss: Divergence = "kl"
    reduction: Reduction = "mean"
    student: object = None
    teacher: object = "csa"
    head: Literal["linear", "norm_linear", "none"] = "linear"
    width: int | None = None


class Temperatures(nn.Module):
    """0-D parameters for image and text, or one shared. The clamp is in place, at the start of a forward pass."""

    def __init__(self, options: TemperatureOptions, default_range: tuple[float, float]) -> None:
        super().__init__()
        o = options
        start = {"image": o.image, "text": o.text}
        self.ranges = {"image": widened(o.image_range, default_range, o.image), "text": widened(o.text_range, default_range, o.text)}
        if o.shared:
            low, high = ((a + b) / 2 for a, b in zip(self.ranges["image"], self.ranges["text"], strict=True))
            start, self.ranges = {"shared": (o.image + o.text) / 2}, {"shared": (low, high)}
        self.values = nn.ParameterDict({name: nn.Parameter(torch.tensor(v), requires_grad=o.learn) for name, v in start.items()})

    @torch.no_grad()
    def clamp_(self) -> None:
        for name, value in self.values.items():
            value.clamp_(*self.ranges[name])

    def pair(self) -> tuple[Tensor, Tensor]:
        """(image, text)."""
        v = self.values
        return (v["shared"], v["shared"]) if "shared" in v else (v["image"], v["text"])


@dataclass(frozen=True)
class Slot:
    """One temperature of one term. lender: the slot that `csa` stands for, where this one can be borrowed from CSA; from_itc: it can be
    borrowed from the contrastive term."""

    term: Literal["csa", "usa"]
    role: Literal["student", "teacher"]
    given: object
    default: Options
    clamp: tuple[float, float]
    lender: str | None = None

    @property
    def name(self) -> str:
        return f"{self.term}_{self.role}"

    @property
    def from_itc(self) -> bool:
        return self.role == "student"

    def made(self, forced: Options) -> Temperatures:
        """An own temperature. Raises ValueError for what is neither a number nor a mapping, or for a wrong option."""
        given = self.given
        if isinstance(given, int | float) and not isinstance(given, bool):
            given = {"image": float(given), "text": float(given)}
        if not (given is None or isinstance(given, dict)):
            raise ValueError(f"method cusa: {self.term}.{self.role} is a number or a mapping, not {given!r}")
        what = f"method cusa, {self.term}.{self.role}"
        return Temperatures(read_options(TemperatureOptions, {**self.default, **(given or {}), **forced}, what), self.clamp)


class TemperatureSet(nn.ModuleDict):
    """The temperatures that the terms own, by slot (csa_student, ...), and from whom the others borrow theirs."""

    def __init__(self, csa: CSAOptions | None, usa: USAOptions | None, itc: bool) -> None:
        """itc: the contrastive term is on. Raises ValueError for a temperature borrowed from a term that is off."""
        super().__init__()
        self.lenders: dict[str, str] = {}
        mixed = {"shared": True} if csa is not None and csa.mode != "each" else {}
        for slot in _slots(csa, usa):
            if slot.given == "itc" and slot.from_itc:
                if not itc:
                    raise ValueError(f"method cusa: {slot.term}.student borrows the temperature of itc, which is off; give it a number")
                self.lenders[slot.name] = "itc"
            elif slot.given == "csa" and slot.lender is not None:
                if csa is None:
                    raise ValueError(
                        f"method cusa: usa.{slot.role} borrows the temperature of csa, which is off; give it a number, "
                        f"e.g. usa.{slot.role}=1.0"
                    )
                self.lenders[slot.name] = self.lenders.get(slot.lender, slot.lender)
            else:
                self[slot.name] = slot.made(mixed if slot.term == "csa" else {})

    def clamp_(self) -> None:
        for own in self.values():
            assert isinstance(own, Temperatures)
            own.clamp_()

    def pair(self, name: str, itc: Tensor | None) -> tuple[Tensor, Tensor]:
        """(image, text) of a slot, borrowed ones resolved. itc: the temperature of the contrastive term, where it is on."""
        lender = self.lenders.get(name, name)
        if lender == "itc":
            assert itc is not None
            return itc, itc
        own = self[lender]
        assert isinstance(own, Temperatures)
        return own.pair()


def _slots(csa: CSAOptions | None, usa: USAOptions | None) -> Iterator[Slot]:
    if csa is not None:
        yield Slot("csa", "student", csa.student, {**STUDENT, "shared": True}, (0.1, 0.99))
        yield Slot("csa", "teacher", csa.teacher, {**TEACHER, "shared": True}, (0.1, 1.0))
    if usa is not None:
        yield Slot("usa", "student", usa.student, {**STUDENT, "shared": False}, (0.1, 1.0), lender="csa_student")
        yield Slot("usa", "teacher", usa.teacher, {**TEACHER, "shared": False}, (0.1, 1.0), lender="csa_teacher")
