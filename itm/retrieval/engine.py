"""The best answers of an index to questions, by a matcher: across modalities by its scores, within one by its uni-modal vectors.

    engine = Engine(matcher, Index.open("data/index", matcher))
    (found,) = engine.answer([Question(text="two dogs in the snow", where={"split": ["test"]})])

Questions are answered in batches: what is asked of the same rows is scored together. A question of a text and an image adds both scores,
each standardised over the same evenly spread rows of the index, since a matcher's score and a cosine have different scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypedDict, Unpack

import torch
from torch import Tensor

import itm
from itm.data import files
from itm.device import resolve_device
from itm.evaluation.scoring import scoring_mode
from itm.precision import computing
from itm.retrieval.answers import answered
from itm.retrieval.asking import Asked, Scorer, background, combined, over
from itm.retrieval.explaining import explained
from itm.retrieval.first_stage import FirstStage
from itm.retrieval.index import Index
from itm.retrieval.questions import Explanation, Hit, Hits, Question
from itm.retrieval.scan import PART_ROWS, VECTOR_ROWS, best
from itm.retrieval.sides import Find, Side
from itm.types import Matcher

__all__ = ["Calibration", "Engine", "Explanation", "Find", "Hit", "Hits", "Place", "Question", "search"]


class Calibration(Protocol):
    """How the scores of one question become probabilities, seen against its scores of evenly spread rows."""

    def __call__(self, scores: Tensor, background: Tensor, find: Find) -> Tensor:
        """scores (N,) of answers, background (B,) of the same question -> (N,) the probability that each answer is right."""


class Engine:
    """A matcher and an index, held for many questions."""

    def __init__(
        self, matcher: Matcher, index: Index, device: str = "auto", rerank: int | None = None, calibration: Calibration | None = None
    ) -> None:
        """rerank: the candidates of the first stage that the matcher scores; None = as many as `itm index --screen` chose, else every row.

        Raises ValueError for rerank < 1, a device that is not there, and as `FirstStage`.
        """
        if rerank is not None and rerank < 1:
            raise ValueError(f"rerank is {rerank}; keep at least one candidate")
        self.device = resolve_device(device)
        self.matcher, self.index, self.calibration = matcher.eval().to(self.device), index, calibration
        self.first = FirstStage(index, self.device)
        self.rerank = self.first.keep if rerank is None else rerank

    def answer(self, questions: Sequence[Question]) -> list[Hits]:
        """The best answers to each question, in the order of the questions.

        Raises ValueError for a question that cannot be answered: no text and no image, an unreadable image, k < 1, an unknown filter,
        captions asked of images without any, a matcher without vectors asked within a modality, min_score without calibration.
        """
        for question in questions:
            question.check()
            if question.find == "captions" and not len(self.index.captions):
                what = question.text or "the image"
                raise ValueError(f"the images of {self.index.place} have no captions, so none can be found for {what}: ask for images")
            if question.min_score is not None and self.calibration is None:
                raise ValueError("min_score needs calibrated scores, and this engine has no calibration")
            if question.min_score is not None and not question.crosses:
                raise ValueError("min_score is known across modalities only: ask for images by a text alone, or for captions by an image")
        asked = Asked(self.matcher, questions, self.device)
        groups: dict[object, list[int]] = {}
        for number, q in enumerate(questions):
            same = q.find, q.text is None, q.image is None, tuple(sorted((name, tuple(values)) for name, values in q.where.items()))
            groups.setdefault(same, []).append(number)
        found: dict[int, Hits] = {}
        with scoring_mode(self.matcher, self.device), computing("fp32", self.device):
            for numbers in groups.values():
                found |= zip(numbers, self._together(asked, numbers, [questions[n] for n in numbers]), strict=True)
        return [found[number] for number in range(len(questions))]

    def explain(self, question: Question, key: str) -> Explanation:
        """Where the words of the question look in the image `key`.

        Raises ValueError for a question without a text, a key that is not there, a matcher without attention, and an image whose parts lie
        nowhere known.
        """
        if question.text is None:
            raise ValueError("the words of a text are explained, and the question has none: ask with a text")
        return explained(self.matcher, self.index.sample(key), question.text, self.device)

    def _together(self, asked: Asked, numbers: list[int], questions: list[Question]) -> list[Hits]:
        """Questions of one kind that are asked of the same rows."""
        find = questions[0].find
        side, rows = self._side(find), self.index.rows(find, questions[0].where)
        if rows is not None and not len(rows):
            return [self._hits(q, torch.empty(0, dtype=torch.int64), torch.empty(0), None) for q in questions]
        exact = self._exact(asked, numbers, find)
        usual = exact(background(side, self.index.rows(find))) if self.calibration and questions[0].crosses else None
        if self.rerank is None and not self.first.quickly(questions[0]):
            pieces = PART_ROWS if "parts" in side.fields else VECTOR_ROWS
            found = list(zip(*best(lambda block: over(exact, side, block), len(side), rows, _wanted(questions), pieces), strict=True))
        else:
            found = self._screened(asked, numbers, questions, rows)
        return [
            self._hits(q, places, values, None if usual is None else usual[n])
            for n, (q, (values, places)) in enumerate(zip(questions, found, strict=True))
        ]

    def _screened(self, asked: Asked, numbers: list[int], questions: list[Question], rows: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """The best of what a first stage proposes to each question, scored exactly: scores and rows."""
        find, wanted = questions[0].find, _wanted(questions)
        side, keep = self._side(find), max(self.rerank or 0, wanted)
        found = []
        proposed = self.first.propose(asked, numbers, questions, rows, keep)
        for number, candidates in zip(numbers, proposed, strict=True):
            exact = self._exact(asked, [number], find)
            values, places = best(lambda block, exact=exact: exact(side.read(block)), len(side), candidates, wanted, PART_ROWS)  # type: ignore[misc]
            found.append((values[0], places[0]) if len(candidates) else (torch.empty(0), candidates))
        return found

    def _exact(self, asked: Asked, numbers: Sequence[int], find: Find) -> Scorer:
        return combined(asked.scorers(numbers, find), self._side(find), self.index.rows(find))

    def _side(self, find: Find) -> Side:
        return self.index.images if find == "images" else self.index.captions

    def _hits(self, q: Question, rows: Tensor, scores: Tensor, usual: Tensor | None) -> Hits:
        """rows and scores: the best, maybe more than are wanted; usual: the background's scores (B,) of this question, where calibrated."""
        likely = None if self.calibration is None or usual is None else self.calibration(scores, usual, q.find)
        return answered(self.index, q, rows, scores, likely)


def _wanted(questions: Sequence[Question]) -> int:
    """Answers to find: one more than the first at least, since how far an answer leads is seen at the next one."""
    return max(2, *(q.k + q.offset for q in questions))


# --- one question, as `itm search` asks it ----------------------------------------------------------------------------------------------


class Place(TypedDict, total=False):
    """Where and how to search.

    index: what `itm index` wrote, or where encoded splits are kept (default <shards>/index); device: auto (default), cpu, cuda, ...
    (`resolve_device`); where: filters; rerank: candidates that a first stage proposes, None = as the index says, else all.
    """

    index: str | None
    device: str
    where: Mapping[str, Sequence[str]]
    rerank: int | None


def search(
    text: str | None = None,
    *,
    model: str | Matcher,
    shards: str | None = None,
    image: str | None = None,
    k: int = 5,
    find: Find | None = None,
    **place: Unpack[Place],
) -> Hits:
    """The k best images for `text`, or the k best captions for the file `image`; `find` asks for the other kind of answer.

    Across modalities the score is the matcher's, within one the cosine of `uni_vectors`: its uni-modal heads where it has some.
    model: a URI as in `itm.load_matcher`, or a matcher that was loaded. place: `Place`.
    Raises ValueError for an unknown model or split, an unreadable image, k < 1, a device that is not there, captions asked of a split
    without any, or a matcher without vectors asked within a modality.
    """
    find = find or ("captions" if text is None else "images")
    asked = Question(text, None if image is None else files.read_bytes(image), find, k, where=place.get("where") or {})
    asked.check()
    where = resolve_device(place.get("device", "auto"))
    matcher = itm.load_matcher(model) if isinstance(model, str) else model
    uni = (find == "captions") == (text is not None)
    index = _index(matcher, shards, place.get("index"), where, uni)
    (found,) = Engine(matcher, index, str(where), place.get("rerank")).answer([asked])
    return Hits(text if text is not None else str(image), found.searched, found.hits)


def _index(matcher: Matcher, shards: str | None, index: str | None, device: torch.device, uni: bool) -> Index:
    """A finished index where one is named, or lies in its usual place and is of this matcher; else the split, encoded and kept."""
    if shards is None:
        if index is None:
            raise ValueError("say what to search: --shards FOLDER, or --index FOLDER that `itm index` wrote")
        return Index.open(index, matcher)
    place = index or files.join(shards, "index")
    if Index.made(place, matcher):
        return Index.open(place, matcher)
    return Index.of_shards(matcher, shards, place, device, uni)
