"""Evaluation protocols: which pairs are asked, against which truth, and how the numbers are averaged.

A protocol takes `Scored` (or the matcher itself) and gives `Outcome`, or refuses with counts when it does not fit the split. A new
protocol costs one file and one line in `itm.evaluation.PROTOCOLS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from itm.data.formats import Json
from itm.evaluation import PROTOCOLS, coco_truth
from itm.evaluation.counting import BLOCK_SCORES
from itm.evaluation.dataset import Names
from itm.evaluation.metrics import (
    KS,
    Ranking,
    Scores,
    chance_metrics,
    chance_of,
    check_scores,
    checked_metrics,
    equivalence_metrics,
    rank_queries,
    retrieval_metrics,
)
from itm.evaluation.uni_modal import uni_vectors
from itm.kinds import build_part
from itm.types import Encoded, Matcher, Options


@dataclass(frozen=True)
class Scored:
    """A split after scoring: scores (I,T), who the rows are, all true pairs where known (I,T) bool, and the vectors for uni-modal use."""

    scores: Scores
    names: Names
    relevance: Tensor | None = None
    images: Encoded | None = None
    captions: Encoded | None = None


@dataclass(frozen=True)
class Outcome:
    """metrics and chance share keys; `protocol` says in words what was measured; counts: queries and pairs behind the numbers;
    details: what else evaluation.json shall hold."""

    protocol: str
    metrics: dict[str, float]
    chance: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)
    details: Json = field(default_factory=dict)


class Protocol:
    """How a matcher is judged. A protocol of one's own subclasses `ScoreProtocol` or `MatcherProtocol`; its options are the keyword
    arguments of its class (`evaluation.options`)."""

    def identity(self) -> Json:
        """What the result depends on besides split and matcher, JSON-able; empty = nothing."""
        return {}


class ScoreProtocol(Protocol, ABC):
    """Judges the scores of a split, wherever they come from. It reads those of `folds` consecutive blocks of images with their own
    captions alone; what lies outside of them may be -inf."""

    folds: ClassVar[int] = 1

    @abstractmethod
    def measure(self, scored: Scored, tie: str) -> Outcome:
        """tie: how equal scores are ordered, of `itm.evaluation.TIES`. Raises ValueError, with counts, for a split that does not fit."""


@dataclass(frozen=True)
class Question:
    """What a protocol of the matcher may read: the shards of a split, or files of sentence pairs (`reads` says which)."""

    split_uri: str = ""
    pairs: Sequence[str] = ()
    columns: Sequence[str] | None = None
    batch_size: int = 256
    max_reject_rate: float = 0.01
    device: str | torch.device = "cpu"


class MatcherProtocol(Protocol, ABC):
    """Asks the matcher itself, where no matrix of scores can answer."""

    reads: ClassVar[Literal["split", "pairs"]] = "split"
    score_type: ClassVar[str] = "asked of the matcher"
    """Which numbers are compared, in words."""

    def files_of(self, pairs: Sequence[str]) -> list[str]:
        """The files that `--pairs` leads to: their bytes are part of what the result depends on."""
        return list(pairs)

    @abstractmethod
    def measure(self, matcher: Matcher, asked: Question) -> Outcome:
        """matcher: as `itm.load_matcher` gives it. Raises ValueError when it cannot answer, or nothing can be measured."""


def find_protocol(name: str, options: Options | None = None) -> Protocol:
    """Raises ValueError for an unknown protocol, or an option that it has not or lacks."""
    protocol = build_part(PROTOCOLS, name, options or {}, "protocol")
    assert isinstance(protocol, Protocol)  # the base of the table, which a table cannot import
    return protocol


def run_protocol(name: str, scored: Scored, tie: str = "pessimistic", options: Options | None = None) -> Outcome:
    """Raises ValueError as `find_protocol`, and for one that does not fit the split, bad ids, bad shapes or NaN scores."""
    protocol = find_protocol(name, options)
    if not isinstance(protocol, ScoreProtocol):
        raise ValueError(f"protocol {name} asks the matcher itself, not its scores: name one matcher, and no score file")
    scored.names.check()
    check_scores(scored.scores, scored.names.positives, (scored.names.image_keys, scored.names.caption_ids))
    return protocol.measure(scored, tie)


def all_pairs(scored: Scored, tie: str, title: str = "all images x all captions") -> Outcome:
    """Every image against every caption of the split; mAP@R over the exact relevance where the source knows it."""
    positives = scored.names.positives
    metrics = checked_metrics(scored.scores, positives, scored.relevance, tie)
    counts = {"images": len(positives[0]), "captions": len(positives[1])}
    if scored.relevance is not None:
        counts["relevant_pairs"] = int(scored.relevance.sum())
    truth = "annotated pairs" if scored.relevance is None else "annotated pairs; mAP@R, R-precision and semantic R@1 over exact relevance"
    return Outcome(f"{title}; {truth}; ties {tie}", metrics, chance_metrics(positives, scored.relevance), counts)


class AllPairs(ScoreProtocol):
    """Every image against every caption of the split."""

    def measure(self, scored: Scored, tie: str) -> Outcome:
        return all_pairs(scored, tie)


class Flickr30K(ScoreProtocol):
    """1,000 images, 5 captions each."""

    images: ClassVar[int] = 1000

    def measure(self, scored: Scored, tie: str) -> Outcome:
        _require_size(scored.names, "flickr30k-1k", self.images, (5 * self.images,))
        return all_pairs(scored, tie, f"Flickr30K test, {self.images:,} images x {5 * self.images:,} captions")


class Coco5K(ScoreProtocol):
    """5 captions an image (25,000), or all captions as IAIS takes them (25,010)."""

    images: ClassVar[int] = 5000

    def measure(self, scored: Scored, tie: str) -> Outcome:
        _require_size(scored.names, "coco-5k", self.images, (5 * self.images, 5 * self.images + 10))
        return all_pairs(scored, tie, f"COCO 5K test, {self.images:,} images x {len(scored.names.caption_ids):,} captions")


class Coco1KFolds(ScoreProtocol):
    """The mean over five consecutive blocks of 1,000 images (see `folds`)."""

    images: ClassVar[int] = 5000
    folds: ClassVar[int] = 5

    def measure(self, scored: Scored, tie: str) -> Outcome:
        _require_size(scored.names, "coco-1k-5fold", self.images, (5 * self.images, 5 * self.images + 10))
        metrics, chance = folds(scored, self.folds, tie)
        counts = {"images": self.images, "captions": len(scored.names.caption_ids), "folds": self.folds}
        title = f"COCO 1K, mean of five consecutive folds of {self.images // self.folds:,} images; ties {tie}"
        return Outcome(title, metrics, chance, counts)


def folds(scored: Scored, count: int, tie: str = "pessimistic") -> tuple[dict[str, float], dict[str, float]]:
    """Mean metrics and chance over `count` consecutive blocks of images, each against its own captions.

    As docs/methods/scan.md#evaluation-protocol has it.
    """
    size = len(scored.names.image_keys) // count
    rows: list[tuple[dict[str, float], dict[str, float]]] = []
    for start in range(0, size * count, size):
        columns = ((scored.names.caption_image >= start) & (scored.names.caption_image < start + size)).nonzero()[:, 0]
        truth = (torch.arange(size), scored.names.caption_image[columns] - start)
        chosen = _span(columns)
        relevance = None if scored.relevance is None else scored.relevance[start : start + size, chosen]
        found = retrieval_metrics(scored.scores[start : start + size][:, chosen], truth, relevance, tie)
        rows.append((found, chance_metrics(truth, relevance)))
    return _mean([metrics for metrics, _ in rows]), _mean([chance for _, chance in rows])


def _span(rows: Tensor) -> slice | Tensor:
    """The slice of rising numbers that follow each other, which copies nothing; others as they are."""
    whole = len(rows) > 0 and int(rows[-1] - rows[0]) == len(rows) - 1
    return slice(int(rows[0]), int(rows[-1]) + 1) if whole else rows


class ECCV(ScoreProtocol):
    """ECCV Caption: R@1, mAP@R, R-precision over its human-checked positives; truth from the eccv-caption package.

    Formulas: docs/methods/cusa.md#equivalence-metrics.
    """

    def measure(self, scored: Scored, tie: str) -> Outcome:
        return _coco_wide(scored, tie, "eccv", "ECCV Caption on COCO 5K")


class CxC(ScoreProtocol):
    """CxC: recalls over its positives; truth from the eccv-caption package."""

    def measure(self, scored: Scored, tie: str) -> Outcome:
        return _coco_wide(scored, tie, "cxc", "CxC on COCO 5K")


class ImageToImage(ScoreProtocol):
    """Image -> image: R@1 and mAP@R; relevant = another image of the same scene, class or label in the metadata.

    Protocol: docs/methods/cusa.md#image-retrieval.
    """

    def measure(self, scored: Scored, tie: str) -> Outcome:
        labels = _labels(scored.names)
        return _one_modality("i2i", uni_vectors(scored.images, "image"), labels, tie, "image -> image, the query itself left out")


class TextToText(ScoreProtocol):
    """Caption -> caption: R@1 and mAP@R; relevant = another caption of the same image."""

    def measure(self, scored: Scored, tie: str) -> Outcome:
        vectors, title = uni_vectors(scored.captions, "caption"), "caption -> caption of the same image"
        return _one_modality("t2t", vectors, scored.names.caption_image, tie, title)


def same_label_metrics(
    vectors: Tensor, labels: Tensor, gallery: tuple[Tensor, Tensor] | None = None, tie: str = "pessimistic", ks: Sequence[int] = (1,)
) -> Json:
    """Cosine retrieval by label: one set against itself without the query, or against a gallery (vectors (G,D), labels (G,)).

    vectors (N,D), labels (N,). Returns r1 and the like of `ks` (percent), map_at_r, r_precision (0..1) over the queries that have a
    relevant row, `queries`, their number, and `chance` of these. Raises ValueError when no query has one.
    """
    others, other_labels = gallery or (vectors, labels)
    query, others = (torch.nn.functional.normalize(v, dim=1) for v in (vectors, others))
    rows = max(1, BLOCK_SCORES // len(others))
    pieces = []
    for start in range(0, len(query), rows):
        positives = labels[start : start + rows, None] == other_labels[None, :]
        scores = query[start : start + rows] @ others.T
        if gallery is None:
            positives.diagonal(start).fill_(False)
            scores.diagonal(start).fill_(-torch.inf)
        pieces.append(rank_queries(scores, positives, tie))
    ranking = Ranking.cat(pieces)
    if not ranking.asked.any():
        raise ValueError(f"no row of {len(labels)} shares its label with another one: nothing to retrieve")
    values = equivalence_metrics(ranking)
    found = {f"r{k}": ranking.recall(k) for k in ks} | {name: values[name] for name in ("map_at_r", "r_precision")}
    chance = chance_of(ranking.positives, len(others) - (gallery is None), ks=ks)
    return {**found, "queries": int(ranking.asked.sum()), "chance": {name: chance[name] for name in found}}


def _one_modality(way: str, vectors: Tensor, labels: Tensor, tie: str, title: str) -> Outcome:
    values = same_label_metrics(vectors, labels, tie=tie)
    queries, chance = values.pop("queries"), values.pop("chance")
    metrics, by_chance = ({f"{way}_{name}": value for name, value in found.items()} for found in (values, chance))
    return Outcome(f"{title}; ties {tie}", metrics, by_chance, {"rows": len(labels), "queries": queries})


def _coco_wide(scored: Scored, tie: str, truth: str, title: str) -> Outcome:
    relevance = coco_truth.relevance(truth, scored.names.image_keys, scored.names.caption_ids, scored.names.image_metas)
    metrics: dict[str, float] = {}
    chance: dict[str, float] = {}
    counts: dict[str, int] = {}
    asked = (("i2t", scored.scores, relevance.i2t, relevance.i2t_absent), ("t2i", scored.scores.T, relevance.t2i, relevance.t2i_absent))
    for way, scores, positives, absent in asked:
        ranking = rank_queries(scores, positives, tie, absent)
        recalls, values = {f"r{k}": ranking.recall(k) for k in KS}, equivalence_metrics(ranking)
        found = recalls | {name: values[name] for name in ("map_at_r", "r_precision")}
        by_chance = chance_of(positives.sum(1), positives.shape[1], absent)
        metrics |= {f"{way}_{truth}_{name}": value for name, value in found.items()}
        chance |= {f"{way}_{truth}_{name}": by_chance[name] for name in found}
        counts |= {f"{way}_queries": int(ranking.asked.sum()), f"{way}_pairs": int(positives.sum() + absent.sum())}
    return Outcome(f"{title}; ties {tie}", metrics, chance, counts)


def _require_size(names: Names, protocol: str, images: int, captions: tuple[int, ...]) -> None:
    have = (len(names.image_keys), len(names.caption_ids))
    if have[0] != images or have[1] not in captions:
        wanted = " or ".join(f"{c:,}" for c in captions)
        raise ValueError(
            f"protocol {protocol} is defined on {images:,} images and {wanted} captions; this split has {have[0]:,} and {have[1]:,}. "
            "Use --protocol auto for other splits"
        )


def _labels(names: Names) -> Tensor:
    for key in ("scene", "scene_id", "label", "class"):
        values = [meta.get(key) for meta in names.image_metas]
        if values and None not in values:
            index = {value: row for row, value in enumerate(dict.fromkeys(map(str, values)))}
            return torch.tensor([index[str(value)] for value in values])
    raise ValueError("protocol i2i needs a scene, label or class in the metadata of every image; this split has none")


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
