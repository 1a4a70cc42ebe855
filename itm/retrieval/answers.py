"""Rows and scores of an index as answers that people and programs read."""

from __future__ import annotations

from torch import Tensor

from itm.retrieval.index import Index
from itm.retrieval.questions import Hit, Hits, Question
from itm.retrieval.sides import Find


def answered(index: Index, question: Question, rows: Tensor, scores: Tensor, likely: Tensor | None) -> Hits:
    """The page of the answers that the question asks for. rows, scores and, of a calibrated engine, likely: (N,), best first,
    at least as many as it wants where there are."""
    probabilities: list[float | None] = [None] * len(rows) if likely is None else list(likely.tolist())
    answers = list(zip(rows.tolist(), scores.tolist(), probabilities, strict=True))[question.offset : question.offset + question.k]
    hits = [
        _hit(index, question.find, rank, answer)
        for rank, answer in enumerate(answers, question.offset + 1)
        if question.min_score is None or (answer[2] is not None and answer[2] >= question.min_score)
    ]
    said = " + ".join(part for part in (question.text, None if question.image is None else "an image") if part is not None)
    return Hits(said, f"{len(index)} images, {index.caption_count} captions of {index.place}", hits)


def _hit(index: Index, find: Find, rank: int, answer: tuple[int, float, float | None]) -> Hit:
    names, (row, score, probability) = index.names, answer
    image = int(names.caption_image[row]) if find == "captions" else row
    captions = [row] if find == "captions" else index.captions_of(image)
    return Hit(
        rank,
        score,
        names.image_keys[image],
        names.image_shards[image],
        [names.texts[r] for r in captions],
        [names.caption_ids[r] for r in captions],
        index.metadata(image),
        probability,
    )
