"""What is asked of an index, and what is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from itm.data import files
from itm.retrieval.sides import Find


@dataclass(frozen=True)
class Hit:
    """One answer: an image with its captions, or a caption with its image. `key` and `shard` say where the image lies.

    probability: that it is right, where the engine is calibrated. metadata: the columns of the image that the index kept.
    """

    rank: int
    score: float
    key: str
    shard: str
    captions: list[str]
    caption_ids: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    probability: float | None = None


@dataclass(frozen=True)
class Hits:
    """The best answers to `question`, best first; prints as a table."""

    question: str
    searched: str
    hits: list[Hit]

    def __str__(self) -> str:
        lines = [
            f"{hit.rank:>3}  {hit.score:7.4f}  {hit.key:<16}  {files.name_of(hit.shard):<12}  {' | '.join(hit.captions)}"
            for hit in self.hits
        ]
        return "\n".join([f"{self.question!r} in {self.searched}", *lines])


@dataclass(frozen=True)
class Question:
    """What is asked: by a text, the bytes of an image file, or both; and which of the best answers are wanted.

    offset: leading answers that are left out (the next page). where: filters as in `itm.retrieval.filters`.
    min_score: the least probability of an answer, between 0 and 1, which needs an engine that is calibrated.
    """

    text: str | None = None
    image: bytes | None = None
    find: Find = "images"
    k: int = 5
    offset: int = 0
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    min_score: float | None = None

    @property
    def crosses(self) -> bool:
        """Whether a text alone asks for images, or an image alone for captions: what a probability of a true match is known for."""
        return (self.text is None, self.image is None) == ((False, True) if self.find == "images" else (True, False))

    def check(self) -> None:
        """Raises ValueError for what cannot be answered."""
        if self.text is None and self.image is None:
            raise ValueError("the question has neither a text nor an image")
        if self.k < 1:
            raise ValueError(f"-k is {self.k}; ask for at least one answer")
        if self.offset < 0:
            raise ValueError(f"offset is {self.offset}; the first answer has the offset 0")
        if self.find not in ("images", "captions"):
            raise ValueError(f"find={self.find!r} is unknown; ask for images or captions")
        if self.min_score is not None and not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score is {self.min_score}; it is a probability between 0 and 1")


@dataclass(frozen=True)
class Explanation:
    """Where the words of a text look in an image.

    words: T of them; weights (T,R): a row for each word over the regions or patches; boxes (R,4): x1 y1 x2 y2 in pixels of the image,
    which is `width` x `height`; grid: the boxes are patches of a grid.
    """

    text: str
    words: list[str]
    weights: list[list[float]]
    boxes: list[list[float]]
    width: int
    height: int
    grid: bool
