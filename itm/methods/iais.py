"""IAIS (Ren et al., ACL-IJCNLP 2021, arXiv 2105.13868): hinge ranking on hard negatives + aligned relations of matched pairs.

Each step has two halves. Image-anchored: one image and many captions, with the relations among regions as the anchor (V). Text-anchored:
one caption and many images, with the relations among words as the anchor (L). Where paper and code differ, the code is the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypedDict, Unpack

import torch
from pydantic import Field
from torch import Tensor

from itm.config import Strict
from itm.kinds import refuse_unknown
from itm.losses.relation import COUNTERPARTS, KINDS, relation_alignment_loss
from itm.losses.triplet import triplet_loss
from itm.matchers.chunked import seen_by_checkpoint, slices
from itm.methods.iais_mining import first_of_each, hardest_in_batch, mining_mode
from itm.methods.terms import matcher_terms, read_options
from itm.types import Batch, Captions, Encoded, Images, Matcher, Method, Options, Relations, positives_from_ids

SCHEDULES = ("exp", "linear", "log", "constant")


class Ranking(Strict):
    """hard_negatives kept for each positive; positives trained a half step (None = whole batch); margin of the hinge on sigmoid scores.

    loss "softmax" (extension): cross entropy of the positive within its group, for training from scratch, where sigmoids of a fresh
    head are too flat for the hinge to move; random_steps (extension): so many first steps draw negatives at random, because the hardest
    ones make fresh scores collapse to a constant. The authors need neither: they start from a pre-trained UNITER.
    pools: shared, both halves take positives and negatives from the whole batch; two, as the authors: the image-anchored half from the
    first half of it and the text-anchored one from the rest, a pool each (of 800 pairs for their 400).
    """

    loss: Literal["hinge", "softmax"] = "hinge"
    margin: float = 0.2
    hard_negatives: int = Field(31, ge=1)
    positives: int | None = Field(None, ge=1)
    random_steps: int = Field(0, ge=0)
    pools: Literal["shared", "two"] = "shared"


class Choices(TypedDict, total=False):
    alignment: str
    weight: float
    schedule: str
    steps: int
    counterpart: str
    anchors: Sequence[str]
    ranking: Options | None


DEFAULTS: Choices = {
    "alignment": "singular",
    "weight": 8.0,
    "schedule": "exp",
    "steps": 5000,
    "counterpart": "softmax",
    "anchors": ("V", "L"),
    "ranking": None,
}


class IAIS(Method):
    """`alignment` = singular | distributed | soft, weighted by `weight` x tau(step) over `steps` steps (`schedule`).

    weight 8 reproduces the released code, which divides the ranking loss, but not this one, by its 8 accumulated micro-steps; 0 switches
    the alignment off. `anchors`: V aligns in the image-anchored half, L in the text-anchored one; the half of one that is left out ranks
    only. `ranking`: fields of `Ranking`. `counterpart`: see `itm.losses.relation.relation_distances`.
    With a single-stream matcher negatives are mined in evaluation mode and every kept pair goes through the joint encoder; extension:
    any other matcher with parts takes the hinge triplet loss (hardest negative) and relations from cosines of its parts.
    Raises ValueError for an unknown choice, or a matcher without words and regions to relate.
    """

    def __init__(self, matcher: Matcher, **options: Unpack[Choices]) -> None:
        super().__init__()
        matcher.check_relations()
        refuse_unknown(options, Choices.__annotations__, "IAIS")
        o: Choices = {**DEFAULTS, **options}
        for name, known in (("alignment", KINDS), ("schedule", SCHEDULES), ("counterpart", COUNTERPARTS)):
            if o[name] not in known:  # type: ignore[literal-required]
                raise ValueError(f"method.options.{name}: unknown {o[name]!r}; known: {', '.join(known)}")  # type: ignore[literal-required]
        self.matcher = matcher
        self.alignment, self.counterpart, self.anchors = o["alignment"], o["counterpart"], frozenset(o["anchors"])
        self.weight, self.schedule, self.steps = o["weight"], o["schedule"], o["steps"]
        if not self.anchors or not self.anchors <= {"V", "L"}:
            raise ValueError(f"method.options.anchors: a list of V, L or both, not {o['anchors']!r}")
        self.ranking = read_options(Ranking, o["ranking"] or {}, "method.options.ranking")

    def forward(self, batch: Batch, step: int = 0, chunk: int | None = None) -> dict[str, Tensor]:
        """B pairs, negatives from the other pairs of the batch, or of its half (`Ranking.pools`).

        step = optimiser steps already taken. Returns weighted terms: rank_image, rank_text (or triplet), iais_image (V), iais_text (L).
        Raises ValueError when the batch holds one image only. chunk: not of a joint matcher, which keeps what a score needs.
        """
        if not self.matcher.joint:
            return self._extension(batch, step, chunk)
        columns = self._mine(batch, step)
        images, captions = self.matcher.encode_images(batch.images), self.matcher.encode_captions(batch.captions)
        return {
            **self._half("V", images, captions, columns["V"], step),
            **self._half("L", images, captions, columns["L"], step),
        }

    def alignment_weight(self, step: int) -> float:
        """weight x tau(step)."""
        return self.weight * annealing(self.schedule, step, self.steps)

    def _mine(self, batch: Batch, step: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Per anchor: rows of the batch (G,1+K) with the positive first, and which negatives are real (G,K)."""
        mined = {}
        for anchor, (pool, table) in self._pools(batch, step).items():
            ids = batch.images.image_id[pool]
            allowed = ~positives_from_ids(ids, batch.captions.image_id[pool])
            if anchor == "L":
                allowed = allowed.T & first_of_each(ids)
            columns, real = hardest_in_batch(table, allowed[: len(table)], self.ranking.hard_negatives)
            own = torch.arange(len(table), device=table.device)[:, None]
            mined[anchor] = torch.cat([own, columns], 1) + pool.start, real
        return mined

    def _pools(self, batch: Batch, step: int) -> dict[str, tuple[slice, Tensor]]:
        """The pool of each half, rows of the batch, and scores of its first pairs, the positives, with all of it: V (G,T) by image and
        L (G,I) by caption; only these pairs are run."""
        pairs, most, matcher = len(batch.images), self.ranking.positives, self.matcher
        cut = pairs // 2 if self.ranking.pools == "two" else None
        first, second = slice(0, cut or pairs), slice(cut or 0, pairs)
        if step < self.ranking.random_steps:
            scores = torch.rand(pairs, pairs, device=batch.captions.tokens.device)
            return {"V": (first, scores[first, first][:most]), "L": (second, scores.T[second, second][:most])}
        with mining_mode(matcher):
            images, captions = matcher.encode_images(batch.images), matcher.encode_captions(batch.captions)
            if most is None and not cut:
                scores = matcher.score(images, captions)
                return {"V": (first, scores), "L": (second, scores.T)}
            by_image = matcher.score(images[first][:most], captions[first])
            return {"V": (first, by_image), "L": (second, matcher.score(images[second], captions[second][:most]).T)}

    def _half(self, anchor: str, images: Encoded, captions: Encoded, columns: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        others, real = columns
        groups, size = others.shape
        fixed = others[:, 0].repeat_interleave(size)
        rows = (images[fixed], captions[others.flatten()]) if anchor == "V" else (images[others.flatten()], captions[fixed])
        first = torch.arange(0, groups * size, size, device=others.device)
        pairs = self.matcher.pairs(*rows, first if self.weight and anchor in self.anchors else None)
        scores = pairs.scores.view(groups, size)
        ranked = self._ranking_loss(scores if scores.dtype == torch.float64 else scores.float(), real)
        side = "image" if anchor == "V" else "text"
        terms = {f"rank_{side}": ranked}
        if pairs.relations is not None:
            terms[f"iais_{side}"] = self._aligned(pairs.relations, anchor, step)
        return terms

    def _ranking_loss(self, scores: Tensor, real: Tensor) -> Tensor:
        """scores (G,1+K), positive first; real (G,K): the negatives that count."""
        if self.ranking.loss == "softmax":
            return -torch.cat([scores[:, :1], scores[:, 1:].masked_fill(~real, -torch.inf)], 1).log_softmax(1)[:, 0].mean()
        probability = scores.sigmoid()
        hinge = (self.ranking.margin + probability[:, 1:] - probability[:, :1]).clamp_min(0)
        return (hinge * real).sum() / real.sum()

    def _aligned(self, relations: Relations, anchor: str, step: int) -> Tensor:
        blocks, masks = relations.blocks, (relations.word_mask, relations.region_mask)
        kind, counterpart, logits = self.alignment, self.counterpart, relations.logits
        loss = relation_alignment_loss(blocks, *masks, anchor=anchor, kind=kind, counterpart=counterpart, logits=logits)
        return self.alignment_weight(step) * loss

    def _extension(self, batch: Batch, step: int, chunk: int | None) -> dict[str, Tensor]:
        images, captions, relations = related(self.matcher.relations, batch, chunk)
        positives = positives_from_ids(batch.images.image_id, batch.captions.image_id)
        scores = self.matcher.score(images, captions)
        terms = {"triplet": triplet_loss(scores, positives, margin=self.ranking.margin)}
        terms |= matcher_terms(self.matcher, scores, positives, batch)
        if self.weight:
            for anchor, side in (a for a in (("V", "image"), ("L", "text")) if a[0] in self.anchors):
                terms[f"iais_{side}"] = self._aligned(relations, anchor, step)
        return terms


Related = tuple[Encoded, Encoded, Relations]


def related(relate: Callable[[Images, Captions], Related], batch: Batch, chunk: int | None) -> Related:
    """`relate` of the pairs of a batch, `chunk` of them at a time without keeping activations; None: as it is."""
    if chunk is None:
        return relate(batch.images, batch.captions)
    made = [seen_by_checkpoint(relate, batch.images[own], batch.captions[own]) for own in slices(len(batch.images), chunk)]
    images, captions, pieces = zip(*made, strict=True)
    return Encoded.cat(images), Encoded.cat(captions), Relations.cat(pieces)


def annealing(schedule: str, step: int, steps: int) -> float:
    """tau of `step` steps already taken: exp(5(t/T - 1)), t/T, 1 - exp(-5 t/T), or 1."""
    done = step / steps
    match schedule:
        case "exp":
            return math.exp(5 * (done - 1))
        case "linear":
            return done
        case "log":
            return 1 - math.exp(-5 * done)
        case _:
            return 1.0
