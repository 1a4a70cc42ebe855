"""CUSA: cross-modal (CSA) and uni-modal (USA) soft-label alignment added to a ranking loss, for any matcher.

    total = ITC (or triplet) + CSA + USA        every term returned with its weight applied; a switched-off term is absent

CSA needs scores only: any score matrix divided by the temperature, cosines or not (for SGR and SAF the similarity in (0,1): a choice,
the authors do not say). USA needs one vector per image and caption: the matcher's own uni heads (`heads: {uni: true}` of dual and clip),
else a linear layer that this method owns, on the global vector or the mean of the parts (docs/methods/cusa.md#other-base-models).
A recipe for the small variant without clamped scales: itc {reduction: sum}, csa {weight: 1, student: itc, teacher: 0.05},
usa {weight: 1, student: itc, teacher: 0.05}.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from itm.config import Strict
from itm.distributed import gather_rows
from itm.losses.contrastive import Reduction
from itm.losses.soft_label import Divergence, Mode, cosine_matrix, mixed_similarity, soft_label_loss
from itm.matchers.dual import Head
from itm.matchers.norms import masked_mean
from itm.methods.matching import (
    ContrastiveOptions,
    ContrastiveTerm,
    Gather,
    TripletOptions,
    TripletTerm,
    auxiliary_losses,
    batch_positives,
    encode,
    read_options,
    widened,
)
from itm.types import Batch, Encoded

Options = dict[str, Any] | bool | None
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
    student: Any = None
    teacher: Any = None


class USAOptions(Strict):
    """student, teacher: as in CSA, or "csa" (borrowed from it). head, width: the layer added when the matcher has no uni head."""

    weight: float = 0.5
    loss: Divergence = "kl"
    reduction: Reduction = "mean"
    student: Any = None
    teacher: Any = "csa"
    head: Literal["linear", "norm_linear", "none"] = "linear"
    width: int | None = None


class Temperatures(nn.Module):
    """0-D parameters for image and text, or one shared. The clamp is in place, at the start of a forward pass.

    Values: docs/methods/cusa.md#temperatures.
    """

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


class CUSA(nn.Module):
    """Defaults are the shipped setting for CLIP: itc weight 1 reduction mean, csa 0.1, usa 0.5 (docs/methods/cusa.md#temperatures).

    itc: `ContrastiveOptions`, on unless `triplet` (`TripletOptions`) is given; csa: `CSAOptions`; usa: `USAOptions`; false switches off.
    gather: true = the loss of the concatenated batch of all ranks (scores, ids and teacher vectors) with its one-process gradient after
    DDP's mean; "official" = the same losses with the authors' smaller gradient (see `gather_encoded`); false = each rank its own batch.
    """

    def __init__(
        self,
        matcher: nn.Module,
        *,
        itc: Options = None,
        triplet: Options = None,
        csa: Options = True,
        usa: Options = True,
        gather: Gather = False,
    ) -> None:
        """Raises ValueError for options that cannot run together or that the matcher cannot serve."""
        super().__init__()
        if gather not in (True, False, "official"):
            raise ValueError(f"method cusa: gather is true, false or official, not {gather!r}")
        self.matcher, self.gather = matcher, gather
        itc = not triplet if itc is None else itc
        self.itc = ContrastiveTerm(_read(ContrastiveOptions, itc, "itc")) if _on(itc) else None
        self.triplet = TripletTerm(_read(TripletOptions, triplet, "triplet")) if _on(triplet) else None
        self.csa: CSAOptions | None = _read(CSAOptions, csa, "csa") if _on(csa) else None
        self.usa: USAOptions | None = _read(USAOptions, usa, "usa") if _on(usa) else None
        if not any((self.itc, self.triplet, self.csa, self.usa)):
            raise ValueError("method cusa: itc, triplet, csa and usa are all switched off")
        self.needs_teacher: tuple[str, ...] = ("image", "text") if self.csa or self.usa else ()
        self.temperatures = nn.ModuleDict()
        if self.csa:
            mixed = {"shared": True} if self.csa.mode != "each" else {}
            self._add_temperature("csa_student", self.csa.student, {**STUDENT, "shared": True}, (0.1, 0.99), mixed)
            self._add_temperature("csa_teacher", self.csa.teacher, {**TEACHER, "shared": True}, (0.1, 1.0), mixed)
        if self.usa:
            self._add_temperature("usa_student", self.usa.student, {**STUDENT, "shared": False}, (0.1, 1.0), {})
            self._add_temperature("usa_teacher", self.usa.teacher, {**TEACHER, "shared": False}, (0.1, 1.0), {})
        self.uni_heads = self._make_uni_heads()

    def _add_temperature(self, name: str, given: Any, default: dict[str, Any], clamp: tuple[float, float], forced: dict[str, Any]) -> None:
        term, _, role = name.partition("_")
        if given == "itc" and role == "student":
            if self.itc is None:
                raise ValueError(f"method cusa: {term}.student borrows the temperature of itc, which is off; give it a number")
        elif given == "csa" and term == "usa":
            if self.csa is None:
                raise ValueError(
                    f"method cusa: usa.{role} borrows the temperature of csa, which is off; give it a number, e.g. usa.{role}=1.0"
                )
        else:
            if isinstance(given, (int, float)) and not isinstance(given, bool):
                given = {"image": float(given), "text": float(given)}
            if not (given is None or isinstance(given, dict)):
                raise ValueError(f"method cusa: {term}.{role} is a number or a mapping, not {given!r}")
            options = read_options(TemperatureOptions, {**default, **(given or {}), **forced}, f"method cusa, {term}.{role}")
            self.temperatures[name] = Temperatures(options, clamp)

    def _make_uni_heads(self) -> nn.ModuleDict | None:
        if self.usa is None or getattr(self.matcher, "uni_width", None):
            return None
        if self.usa.head == "none":
            return nn.ModuleDict({"image": nn.Identity(), "text": nn.Identity()})
        width = self.usa.width or getattr(self.matcher, "vector_width", None)
        if not width:
            kind = getattr(self.matcher, "kind", type(self.matcher).__name__)
            raise ValueError(f"method cusa: matcher {kind!r} tells no vector_width; give usa.width, the width of its vectors, or usa=false")
        make = Head if self.usa.head == "norm_linear" else lambda w: nn.Linear(w, w)
        return nn.ModuleDict({"image": make(width), "text": make(width)})

    def temperature(self, name: str) -> tuple[Tensor, Tensor]:
        """(image, text) temperature of `csa_student`, `csa_teacher`, `usa_student` or `usa_teacher`, borrowed ones resolved."""
        if name in self.temperatures:
            return self.temperatures[name].pair()  # type: ignore[operator]
        term, _, role = name.partition("_")
        lender = getattr(self.csa if term == "csa" else self.usa, role)
        if lender == "csa":
            return self.temperature(f"csa_{role}")
        assert self.itc is not None
        return self.itc.tau, self.itc.tau

    def forward(self, batch: Batch, step: int = 0) -> dict[str, Tensor]:
        """{"itc", "triplet", "csa", "usa"} that are on: weighted scalars. Raises ValueError for missing or broken teacher vectors."""
        for part in (self.itc, *self.temperatures.values()):
            if part is not None:
                part.clamp_()  # type: ignore[operator]
        images, captions = encode(self.matcher, batch, self.gather)
        teacher = self._teacher_cosines(batch) if self.needs_teacher else None
        return self.losses((images, captions), batch_positives(batch, self.gather), teacher, step)

    def losses(
        self, encoded: tuple[Encoded, Encoded], positives: Tensor, teacher: tuple[Tensor, Tensor] | None, step: int = 0
    ) -> dict[str, Tensor]:
        """The terms from encoded (images, captions), (I,T) positives and (image, text) teacher cosines (B,B)."""
        found = {}
        if self.itc or self.triplet or self.csa:
            scores = self.matcher.score(*encoded)  # type: ignore[operator]
            if self.itc is not None:
                found["itc"] = self.itc(scores, positives)
            if self.triplet is not None:
                found["triplet"] = self.triplet(scores, positives, step)
            found |= auxiliary_losses(self.matcher, positives)
            if self.csa is not None:
                assert teacher is not None
                targets = mixed_similarity(*teacher, self.csa.mode)
                found["csa"] = self._align(self.csa, (scores, scores.T), targets, "csa")
        if self.usa is not None:
            assert teacher is not None
            students = cosine_matrix(self._uni(encoded[0], "image")), cosine_matrix(self._uni(encoded[1], "text"))
            found["usa"] = self._align(self.usa, students, teacher, "usa")
        return found

    def _align(self, options: Any, students: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor], term: str) -> Tensor:
        """weight * mean of the two directions (docs/methods/cusa.md#soft-label-terms)."""
        taus, teacher_taus = self.temperature(f"{term}_student"), self.temperature(f"{term}_teacher")
        directions = zip(students, targets, taus, teacher_taus, strict=True)
        return options.weight * sum(soft_label_loss(*d, loss=options.loss, reduction=options.reduction) for d in directions) / 2

    def _uni(self, encoded: Encoded, side: str) -> Tensor:
        if self.uni_heads is None:
            assert encoded.uni is not None
            return encoded.uni
        vector = encoded.vector
        if vector is None:
            assert encoded.parts is not None
            vector = masked_mean(encoded.parts, encoded.mask)
        return self.uni_heads[side](vector)

    @torch.no_grad()
    def _teacher_cosines(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = len(batch.images)
        if len(batch.captions) != rows:
            raise ValueError(f"method cusa needs pairs: {rows} images came with {len(batch.captions)} captions")
        image, text = (None, None) if batch.teacher is None else (batch.teacher.image, batch.teacher.text)
        sides = []
        for side, vectors in (("image", image), ("text", text)):
            checked = check_teacher(vectors, rows, side)
            sides.append(cosine_matrix(gather_rows(checked) if self.gather else checked))
        return sides[0], sides[1]


def check_teacher(vectors: Tensor | None, rows: int, side: str) -> Tensor:
    """The vectors, unchanged. Raises ValueError when absent, not (rows, D) with D > 1, not finite, or zero in a row.

    Why: docs/methods/cusa.md#teacher-checks.
    """
    if vectors is None:
        raise ValueError(f"the batch holds no {side} teacher vectors: run `itm teach` and set teachers.{side}, or switch csa and usa off")
    if vectors.dim() != 2 or len(vectors) != rows or vectors.shape[1] < 2:
        raise ValueError(f"{side} teacher vectors have shape {tuple(vectors.shape)}, want ({rows}, D) with D > 1")
    norms = vectors.float().norm(dim=1)
    bad = ~torch.isfinite(norms) | (norms == 0)
    if bool(bad.any()):
        raise ValueError(f"{side} teacher vectors of rows {bad.nonzero().flatten().tolist()[:8]} are zero or not finite: rebuild the store")
    return vectors


def _on(options: Options) -> bool:
    return options is not False and options is not None


def _read(model: type[Strict], options: Options, name: str) -> Any:
    return read_options(model, options if isinstance(options, dict) else {}, f"method cusa, {name}")
