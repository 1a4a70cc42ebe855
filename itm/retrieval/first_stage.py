"""What proposes candidates that are then scored exactly: centroids of parts, or vectors of the matcher itself or of a dual encoder, all of
them or by faiss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import itm
from itm.data.formats import Json
from itm.evaluation.dataset import EncodedSplit
from itm.evaluation.screen import Cheap, by_cosine, choose_k, probe, unit_vectors
from itm.retrieval.approximate import AT, Approximate, faiss_uri, unit
from itm.retrieval.asking import Asked, combined
from itm.retrieval.centroids import SIDES, Centroids
from itm.retrieval.index import Index
from itm.retrieval.questions import Question
from itm.retrieval.scan import VECTOR_ROWS, best, blocks
from itm.retrieval.sides import Find, Side
from itm.retrieval.store import CENTROIDS, OWN
from itm.types import Encoded, Matcher


@dataclass(frozen=True)
class Other:
    """A dual encoder and its index of the same rows."""

    matcher: Matcher
    index: Index


class FirstStage:
    """The proposer of an index, as `itm index --screen` and `--faiss` set it up."""

    def __init__(self, index: Index, device: torch.device, allow: Sequence[str] = ()) -> None:
        """Raises ValueError where the dual encoder of the screen, or its index, is not what it was, and MissingExtra."""
        self.index, self.device = index, device
        screen, quick = index.settings.get("screen"), index.settings.get("faiss", {})
        self.keep: int | None = screen["k"] if screen else None
        by = screen["by"] if screen else OWN
        self.other = opened(index, by, allow) if by not in (OWN, CENTROIDS) else None
        self.centroids = {find: Centroids.read(index, find) for find in SIDES} if by == CENTROIDS else {}
        if self.other is not None:
            self.other.matcher.eval().to(device)
        self.quick = {find: Approximate.read(faiss_uri(index.uri, find), said["kind"], said["effort"]) for find, said in quick.items()}

    def quickly(self, question: Question) -> bool:
        """Whether faiss answers it: one text or image across modalities, without filters, by the matcher's own vectors."""
        across = (question.text is None) == (question.find == "captions") and (question.text is None or question.image is None)
        return question.find in self.quick and across and not question.where and self.other is None and not self.centroids

    def propose(self, asked: Asked, numbers: list[int], questions: list[Question], rows: Tensor | None, keep: int) -> list[Tensor]:
        """Rows, ascending, that are worth an exact score: about `keep` for each question, which all are of one kind."""
        find = questions[0].find
        if self.quickly(questions[0]):
            return self._quickly(unit(asked.encoded(numbers).vector), find, rows, keep)
        if self.centroids and questions[0].crosses:  # a text and an image together are screened by vectors
            coded, words = self.centroids[find], asked.encoded(numbers)
            return list(best(lambda block: coded.scores(words, block), len(coded), rows, keep)[1].sort(dim=1).values)
        index = self.index
        if self.other is not None:
            index, numbers = self.other.index, list(range(len(questions)))
            asked = Asked(self.other.matcher, questions, self.device)
        side = index.images if find == "images" else index.captions
        cheap = combined(asked.scorers(numbers, find, exact=False), side, self.index.rows(find))
        return list(best(lambda block: cheap(side.read(block, ("vector", "uni"), brief=True)), len(side), rows, keep)[1].sort(dim=1).values)

    def _quickly(self, asked: Tensor, find: Find, rows: Tensor | None, keep: int) -> list[Tensor]:
        """faiss knows all rows of the side: it is asked for more while too few of them can be found."""
        there = len(self.index.images if find == "images" else self.index.captions)
        enough, wanted = min(keep, there if rows is None else len(rows)), keep + AT
        while True:
            found = [_among(own[own >= 0], rows) for own in self.quick[find].propose(asked, min(wanted, there))]
            if wanted >= there or all(len(own) >= enough for own in found):
                return found
            wanted *= 4


def _among(found: Tensor, rows: Tensor | None) -> Tensor:
    own = found.sort().values
    return own if rows is None else own[torch.isin(own, rows)]


def opened(index: Index, by: str, allow: Sequence[str]) -> Other:
    """The dual encoder of a screen and its vectors. Raises ValueError where they are not of the same rows."""
    matcher = itm.load_matcher(by, allow=allow)
    own = Index.open(f"{index.uri}/screen", matcher)
    if list(own.names.image_keys) != list(index.names.image_keys) or list(own.names.caption_ids) != list(index.names.caption_ids):
        raise ValueError(f"{by}, which screens for {index.uri}, cannot read the same images and captions: choose another --screen")
    return Other(matcher, own)


def chosen_screen(matcher: Matcher, index: Index, by: str, sample: tuple[float, int], device: torch.device, allow: Sequence[str]) -> Json:
    """The least number of candidates whose loss stays below a bound, on captions and images that are asked for the whole index.

    sample: (bound of the share of hits that are lost, questions each way). Raises ValueError for a sample too small to show it, an index
    without captions, and vectors that are not there.
    """
    bound, questions = sample
    if not len(index.captions):
        raise ValueError(f"{index.uri} has no captions to ask with, so no loss can be measured: search with --rerank K instead of --screen")
    whole = [_whole(side) for side in (index.images, index.captions)]
    cheap = _by_centroids(index, whole) if by == CENTROIDS else _by_vectors(index if by == OWN else opened(index, by, allow).index)
    split = EncodedSplit(whole[0], whole[1], index.names)
    members = list(matcher.averaged)
    sides = [(split.images, split.captions)] if len(members) == 1 else list(zip(split.images.each, split.captions.each, strict=True))
    found = probe(members, sides, cheap, (index.names.caption_image, questions, 0), {"device": device})
    k = choose_k(found, bound)
    return {"by": by, "k": k, "loss": bound, "measured": {one.way: one.report(k) for one in found}}


def _by_vectors(index: Index) -> Cheap:
    return by_cosine(unit_vectors(*(_whole(side, ("vector",)) for side in (index.images, index.captions))))


def _by_centroids(index: Index, whole: Sequence[Encoded]) -> Cheap:
    """whole: the images and captions of the index, which ask for each other."""
    found = [Centroids.read(index, find) for find in SIDES]

    def cheap(way: int, rows: Tensor) -> Tensor:
        coded, asked = found[1 - way], whole[way][rows]
        return torch.cat([coded.scores(asked, block) for block in blocks(len(coded), None, VECTOR_ROWS)], 1)

    return cheap


def _whole(side: Side, only: Sequence[str] | None = None) -> Encoded:
    return side.read(slice(0, len(side))) if only is None else side.read(slice(0, len(side)), only)
