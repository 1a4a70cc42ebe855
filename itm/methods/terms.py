"""Loss terms by name, for every method that ranks the scores of a batch. A new term costs one file and one line here.
A term of one's own is named package.module:Name.

method: {kind: matching, options: {loss: <term>, <option of the term>: ...}}
method: {kind: cusa, options: {<term>: {<option of the term>: ...}, csa: ..., usa: ...}}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from itm.config import Strict
from itm.kinds import Kinds, find_part
from itm.types import Batch, Matcher, Options

Read = TypeVar("Read", bound=Strict)


class Term(nn.Module):
    """A loss over scores. A term subclasses this, names its options and gives `forward`; it may own temperatures (parameters)."""

    choices: ClassVar[type[Strict]] = Strict
    """The options that a recipe can give it."""
    alone: ClassVar[Options] = {}
    """Defaults that differ where it is the only loss (method matching)."""

    def __init__(self, options: Strict) -> None:
        """options: an instance of the term's `choices`."""
        super().__init__()

    def clamp_(self) -> None:
        """Bring temperatures back into their range; called at the start of every forward pass of a method."""

    def reaches_few_pairs(self, step: int) -> bool:
        """Whether most entries of d loss / d scores are 0 at this step, and no parameter of the term has a gradient."""
        return False

    def forward(self, scores: Tensor, positives: Tensor, step: int) -> Tensor:
        """The weighted loss, a scalar. scores (I,T), positives (I,T) bool; step: optimiser steps already taken."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its loss is")


TERMS: Kinds[Term] = Kinds(
    "itm.methods.terms:Term",
    {
        "contrastive": "itm.methods.contrastive:ContrastiveTerm",
        "triplet": "itm.methods.triplet:TripletTerm",
        "sigmoid": "itm.methods.sigmoid:SigmoidTerm",
    },
)


def build_term(name: str, options: Options, what: str, alone: bool = False) -> Term:
    """Raises ValueError for an unknown term, naming the near one, and for an unknown or wrong option. alone: it is the only loss."""
    part = find_part(TERMS, name, "loss term")
    return part(read_options(part.choices, {**part.alone, **options} if alone else options, what))


def ranked(term: Term, each: Sequence[Tensor], positives: Tensor, step: int) -> Tensor:
    """The sum of the term over the scores that a matcher trains (`Matcher.training_scores`)."""
    losses = [term(scores, positives, step) for scores in each]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def mean_score(each: Sequence[Tensor]) -> Tensor:
    """(I,T) the score of the matcher, of those that it trains."""
    return each[0] if len(each) == 1 else torch.stack(list(each)).mean(0)


def matcher_terms(matcher: Matcher, scores: Tensor, positives: Tensor, batch: Batch) -> dict[str, Tensor]:
    """The losses a matcher adds in training to the scores of this rank's batch (or of all ranks); {} in evaluation."""
    return matcher.training_terms(scores, positives, rows=len(batch.images)) if matcher.training else {}


def read_options(model: type[Read], options: Options, what: str) -> Read:
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
