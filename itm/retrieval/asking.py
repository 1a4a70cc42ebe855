"""Questions as a matcher sees them, and how they are scored against rows of an index.

Q = questions   B = rows of a block
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from itm.evaluation.dataset import encode_texts
from itm.evaluation.scoring import encode_rows, score_matrix, scoring_mode
from itm.evaluation.uni_modal import likeness
from itm.precision import computing
from itm.retrieval.questions import Question
from itm.retrieval.sides import Find, Side
from itm.types import Encoded, Matcher

BACKGROUND = 256
"""Rows, evenly spread, whose scores say what is a usual score for a question."""
Scorer = Callable[[Encoded], Tensor]
"""Rows of a side (B) -> scores (Q,B) float32 of some questions."""


class Asked:
    """The texts and the images of questions, each encoded once."""

    def __init__(self, matcher: Matcher, questions: Sequence[Question], device: torch.device) -> None:
        """Raises ValueError naming the question whose image cannot be read."""
        self.matcher, self.device = matcher, device
        texts = list(dict.fromkeys(q.text for q in questions if q.text is not None))
        images = list(dict.fromkeys(q.image for q in questions if q.image is not None))
        self.text_rows = [texts.index(q.text) if q.text is not None else -1 for q in questions]
        self.image_rows = [images.index(q.image) if q.image is not None else -1 for q in questions]
        self.texts = encode_texts(matcher, texts, device=device) if texts else Encoded()
        self.images = _encoded(matcher, images, device) if images else Encoded()

    def encoded(self, numbers: Sequence[int]) -> Encoded:
        """The texts (Q) of some questions, or their images where they have no text."""
        rows, encoded = (self.text_rows, self.texts) if self.text_rows[numbers[0]] >= 0 else (self.image_rows, self.images)
        return encoded[torch.tensor([rows[number] for number in numbers])]

    def scorers(self, numbers: Sequence[int], find: Find, exact: bool = True) -> list[Scorer]:
        """Of the texts and of the images of some questions, which have the same of the two.

        exact: pairs across modalities are scored by the matcher; else, for a first stage, by the cosine of their vectors.
        Raises ValueError for a matcher that has no vectors to do so.
        """
        found = []
        for rows, encoded, other in ((self.text_rows, self.texts, "images"), (self.image_rows, self.images, "captions")):
            chosen = [rows[number] for number in numbers]
            if chosen[0] < 0:
                continue
            asked = encoded[torch.tensor(chosen)]
            if find != other:
                found.append(_within(asked, find))
            else:
                found.append(self._across(asked, find) if exact else _screen(asked))
        return found

    def _across(self, asked: Encoded, find: Find) -> Scorer:
        whole = asked.parts is None and not asked.each
        moved = asked.to(self.device) if whole else asked

        def score(rows: Encoded) -> Tensor:
            if not whole:
                pair = (rows, asked) if find == "images" else (asked, rows)
                scores = score_matrix(self.matcher, *pair, device=self.device)
            else:  # one product: tiles of it would only be copied
                there = rows if self.device.type == "cpu" else rows.to(self.device)
                scores = self.matcher.score(*((there, moved) if find == "images" else (moved, there))).float().cpu()
            return scores.T if find == "images" else scores

        return score


def combined(scorers: Sequence[Scorer], side: Side, rows: Tensor | None) -> Scorer:
    """One score of a text's and an image's: their sum, each standardised over `background` rows."""
    if len(scorers) == 1:
        return scorers[0]
    usual = [scorer(background(side, rows)) for scorer in scorers]
    scales = [(scores.mean(1, keepdim=True), scores.std(1, correction=0, keepdim=True).clamp(min=1e-6)) for scores in usual]

    def score(block: Encoded) -> Tensor:
        return torch.stack([(own(block) - mean) / spread for own, (mean, spread) in zip(scorers, scales, strict=True)]).sum(0)

    return score


def over(score: Scorer, side: Side, rows: slice | Tensor) -> Tensor:
    """(Q,B) of some rows of a side, whose memory is shared with the next rows of this thread."""
    if not isinstance(rows, slice):
        return score(side.read(rows, brief=True))
    found = [score(piece) for piece in side.pieces(rows)]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def background(side: Side, rows: Tensor | None) -> Encoded:
    """`BACKGROUND` rows, evenly spread over all of a side, or over the given ones (N,)."""
    count = len(side) if rows is None else len(rows)
    spread = torch.linspace(0, count - 1, min(BACKGROUND, count)).round().long()
    return side.read(spread if rows is None else rows[spread])


def _within(asked: Encoded, find: Find) -> Scorer:
    what = "image" if find == "images" else "caption"
    return lambda rows: likeness(asked, rows, what)


def _screen(asked: Encoded) -> Scorer:
    def score(rows: Encoded) -> Tensor:
        if asked.vector is None or rows.vector is None:
            raise ValueError("this matcher gives no vectors to screen with: name a dual encoder by --screen, or score every row exactly")
        return F.normalize(asked.vector.float(), dim=1) @ F.normalize(rows.vector.float(), dim=1).T

    return score


def _encoded(matcher: Matcher, images: Sequence[bytes], device: torch.device) -> Encoded:
    with scoring_mode(matcher, device), computing("fp32", device):
        return encode_rows(matcher, matcher.inputs.images(images), device=device)
