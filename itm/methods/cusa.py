"""CUSA: cross-modal (CSA) and uni-modal (USA) soft-label alignment added to a ranking loss, for any matcher.

    total = ITC (or another ranking term) + CSA + USA        every term returned with its weight applied; a switched-off term is absent

CSA needs scores only: any score matrix divided by the temperature, cosines or not (for SGR and SAF the similarity in (0,1): a choice,
the authors do not say). USA needs one vector per image and caption: the matcher's own uni heads (`heads: {uni: true}` of dual and clip),
else a linear layer that this method trains, on the matcher's global vector (`Matcher.whole`) or the mean of the parts
(docs/methods/cusa.md#other-base-models). It is kept and served with the matcher (`itm.matchers.uni_heads`).
A recipe for the small variant without clamped scales: itc {reduction: sum}, csa {weight: 1, student: itc, teacher: 0.05},
usa {weight: 1, student: itc, teacher: 0.05}.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from itm.distributed import gather_rows
from itm.kinds import refuse_unknown
from itm.losses.soft_label import cosine_matrix, mixed_similarity, soft_label_loss
from itm.matchers.uni_heads import UniHeads, give_heads, heads_of, with_heads
from itm.methods.contrastive import ContrastiveTerm
from itm.methods.cusa_temperatures import CSAOptions, TemperatureSet, USAOptions
from itm.methods.encode import Gather, batch_positives, encode
from itm.methods.terms import TERMS, Term, build_term, matcher_terms, mean_score, ranked, read_options
from itm.types import Batch, Encoded, Matcher, Method, Options, SoftLabels

Choice = Options | bool | None
ITC = "itc"  # what the authors call the contrastive term


class CUSA(Method):
    """Defaults are the shipped setting for CLIP: itc weight 1 reduction mean, csa 0.1, usa 0.5 (docs/methods/cusa.md#temperatures).

    itc, triplet or any other of `itm.methods.terms.TERMS`: the options of that ranking term; itc is on unless another one is given.
    csa: `CSAOptions`; usa: `USAOptions`; false switches off.
    gather: true = the loss of the concatenated batch of all ranks (scores, ids and teacher vectors) with its one-process gradient after
    DDP's mean; "official" = the same losses with the authors' smaller gradient (see `gather_encoded`); false = each rank its own batch.
    """

    ranking_terms: ClassVar[tuple[str, ...]] = (ITC, *TERMS)

    def __init__(self, matcher: Matcher, *, csa: Choice = True, usa: Choice = True, gather: Gather = False, **ranking: Choice) -> None:
        """Raises ValueError for options that cannot run together or that the matcher cannot serve."""
        super().__init__()
        own = [name for name in ranking if ":" in name]  # terms of the user's own, by import path
        refuse_unknown(ranking, (*own, *self.ranking_terms, "csa", "usa", "gather"), "method 'cusa'")
        if gather not in (True, False, "official"):
            raise ValueError(f"method cusa: gather is true, false or official, not {gather!r}")
        self.matcher, self.gather = matcher, gather
        if ranking.get(ITC) is None:
            ranking[ITC] = not any(ranking.values())
        self.ranking = [name for name in (*self.ranking_terms, *own) if _on(ranking.get(name))]
        for name in self.ranking:
            term = build_term("contrastive" if name == ITC else name, _given(ranking[name]), f"method cusa, {name}")
            self.add_module(_module_name(name), term)
        self.csa = read_options(CSAOptions, _given(csa), "method cusa, csa") if _on(csa) else None
        self.usa = read_options(USAOptions, _given(usa), "method cusa, usa") if _on(usa) else None
        if not (self.ranking or self.csa or self.usa):
            raise ValueError("method cusa: itc, triplet, csa and usa are all switched off")
        self.needs_teacher = ("image", "text") if self.csa or self.usa else ()
        self.temperatures = TemperatureSet(self.csa, self.usa, itc=ITC in self.ranking)
        before = heads_of(matcher)  # of an earlier CUSA, from which this run goes on
        give_heads(matcher, None)
        self.uni_heads = None if self.usa is None or matcher.uni_width else _uni_heads(self.usa, matcher, before)
        matcher.keeps_whole = self.uni_heads is not None

    @property
    def terms(self) -> dict[str, Term]:
        """The ranking terms that are on, by name."""
        found = {name: self.get_submodule(_module_name(name)) for name in self.ranking}
        return {name: term for name, term in found.items() if isinstance(term, Term)}

    def temperature(self, name: str) -> tuple[Tensor, Tensor]:
        """(image, text) temperature of `csa_student`, `csa_teacher`, `usa_student` or `usa_teacher`, borrowed ones resolved."""
        itc = self.terms.get(ITC)
        return self.temperatures.pair(name, itc.tau if isinstance(itc, ContrastiveTerm) else None)

    def forward(self, batch: Batch, step: int = 0, chunk: int | None = None) -> dict[str, Tensor]:
        """{"itc", "triplet", ..., "csa", "usa"} that are on: weighted scalars, and what the matcher adds.

        Raises ValueError for missing or broken teacher vectors.
        """
        for term in self.terms.values():
            term.clamp_()
        self.temperatures.clamp_()
        encoded = encode(self.matcher, batch, self.gather, chunk)
        teacher = self._teacher_cosines(batch) if self.needs_teacher else None
        found: dict[str, Tensor] = {}
        if self.ranking or self.csa:
            positives = batch_positives(batch, self.gather)
            each = self.matcher.training_scores(*encoded)
            found |= {name: ranked(term, each, positives, step) for name, term in self.terms.items()}
            scores = mean_score(each)
            found |= matcher_terms(self.matcher, scores, positives, batch)
            if self.csa is not None and teacher is not None:
                found["csa"] = self._align(self.csa, (scores, scores.T), mixed_similarity(*teacher, self.csa.mode), "csa")
        if self.usa is not None and teacher is not None:
            students = cosine_matrix(self._uni(encoded[0], "image")), cosine_matrix(self._uni(encoded[1], "text"))
            found["usa"] = self._align(self.usa, students, teacher, "usa")
        return found

    @contextmanager
    def serving(self) -> Iterator[Matcher]:
        with with_heads(self.matcher, self.uni_heads) as matcher:
            yield matcher

    def _align(
        self, options: CSAOptions | USAOptions, students: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor], term: str
    ) -> Tensor:
        """weight * mean of the two directions (docs/methods/cusa.md#soft-label-terms)."""
        taus, teacher_taus = self.temperature(f"{term}_student"), self.temperature(f"{term}_teacher")
        first, second = (
            soft_label_loss(*direction, loss=options.loss, reduction=options.reduction)
            for direction in zip(students, targets, taus, teacher_taus, strict=True)
        )
        return options.weight * (first + second) / 2

    def _uni(self, encoded: Encoded, side: str) -> Tensor:
        if self.uni_heads is None:
            assert encoded.uni is not None
            return encoded.uni
        return self.uni_heads.raw(self.matcher, encoded, side)

    @torch.no_grad()
    def _teacher_cosines(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = len(batch.images)
        if len(batch.captions) != rows:
            raise ValueError(f"method cusa needs pairs: {rows} images came with {len(batch.captions)} captions")
        given = SoftLabels() if batch.teacher is None else batch.teacher
        known = given.host
        sides = []
        for side, vectors, seen in (("image", given.image, known.image), ("text", given.text, known.text)):
            checked = check_teacher(vectors, rows, side, seen)
            sides.append(cosine_matrix(gather_rows(checked) if self.gather else checked))
        return sides[0], sides[1]


def _uni_heads(usa: USAOptions, matcher: Matcher, before: UniHeads | None) -> UniHeads:
    """A layer of each side in the place of the uni heads that the matcher lacks: those of before, or fresh ones."""
    width = usa.width or matcher.vector_width
    if before is not None:
        if (before.kind, before.width) != (usa.head, width):
            raise ValueError(
                f"method cusa: the matcher that this run starts from has uni heads {before.kind!r} of width {before.width}, usa asks for "
                f"{usa.head!r} of width {width}: set usa.head={before.kind} and usa.width={before.width}"
            )
        return before
    if not width and usa.head != "none":
        raise ValueError(
            f"method cusa: matcher {matcher.kind!r} tells no vector_width; give usa.width, the width of its vectors, or usa=false"
        )
    return UniHeads(usa.head, width)


def check_teacher(vectors: Tensor | None, rows: int, side: str, known: Tensor | None = None) -> Tensor:
    """The vectors, unchanged; `known`, the same in main memory, is what is looked at.

    Raises ValueError when absent, not (rows, D) with D > 1, not finite, or zero in a row.

    Why: docs/methods/cusa.md#teacher-checks.
    """
    if vectors is None:
        raise ValueError(f"the batch holds no {side} teacher vectors: run `itm teach` and set teachers.{side}, or switch csa and usa off")
    if vectors.dim() != 2 or len(vectors) != rows or vectors.shape[1] < 2:
        raise ValueError(f"{side} teacher vectors have shape {tuple(vectors.shape)}, want ({rows}, D) with D > 1")
    norms = (vectors if known is None else known).float().norm(dim=1)
    bad = ~torch.isfinite(norms) | (norms == 0)
    if bool(bad.any()):
        raise ValueError(f"{side} teacher vectors of rows {bad.nonzero().flatten().tolist()[:8]} are zero or not finite: rebuild the store")
    return vectors


def _module_name(term: str) -> str:
    """What a module may be called: without the dots of an import path."""
    return term.replace(".", "_")


def _on(choice: Choice) -> bool:
    return choice is not False and choice is not None


def _given(choice: Choice) -> Options:
    return choice if isinstance(choice, dict) else {}
