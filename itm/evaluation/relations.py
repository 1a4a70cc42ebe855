"""ISD and ISDa of IAIS: how far relations among words and among regions of matched pairs differ. Lower is more consistent.

Definitions: docs/methods/iais.md#relation-distance.

ISDa needs annotation: each caption's metadata holds `entities`, a list of {"words": [...], "regions": [...]}, positions from 0 of tokens
of the matcher's tokenizer (start and end not counted) and of regions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor

from itm.data import files
from itm.data.records import Caption, Problem
from itm.data.shards import read_samples
from itm.evaluation.dataset import batches, prepare, shards_of
from itm.evaluation.protocols import MatcherProtocol, Outcome, Question
from itm.evaluation.scoring import scoring_mode
from itm.losses.relation import isd, isda
from itm.types import Images, Matcher, Relations

Entity = dict[str, list[int]]
"""`words` and `regions` of one annotated entity, positions from 0."""
MOST_PAIRS = 64  # relation blocks of so many pairs are held at once


class ISD(MatcherProtocol):
    """Relations among words against relations among regions, by attention alone."""

    score_type: ClassVar[str] = "relation blocks, fp32"
    annotated: ClassVar[bool] = False

    def measure(self, matcher: Matcher, asked: Question) -> Outcome:
        return isd_of_split(matcher, asked.split_uri, self.annotated, min(asked.batch_size, MOST_PAIRS), asked.device)


class ISDa(ISD):
    """The same by annotated entities."""

    annotated: ClassVar[bool] = True


def isd_of_split(
    matcher: Matcher, split_uri: str, annotated: bool, batch_size: int = 64, device: str | torch.device = "cpu", limit: int | None = None
) -> Outcome:
    """Means over every matched pair of a split: isd_{L,V}_{singular,distributed}, or isda_sum and isda_mean where `annotated`.

    limit: no more batches once so many pairs were measured (unset: all).

    Raises ValueError for a matcher without words and regions, and for ISDa where no caption names two entities.
    """
    values: list[dict[str, Tensor]] = []
    counts = {"pairs": 0, "left_out": 0, "rejected": 0}
    problems: list[Problem] = []
    with scoring_mode(matcher, device):
        for captions, relations in _matched_pairs(matcher, split_uri, batch_size, device, problems):
            found = _isda(captions, relations) if annotated else isd(relations.blocks, relations.word_mask, relations.region_mask)
            values.append({name: value.double().cpu() for name, value in found.items()})
            used = len(next(iter(found.values())))
            counts["pairs"] += used
            counts["left_out"] += len(captions) - used
            if limit is not None and counts["pairs"] >= limit:
                break
    counts["rejected"] = len(problems)
    if not counts["pairs"]:
        wanted = "names two entities in its metadata `entities`" if annotated else "has both words and regions"
        raise ValueError(f"{split_uri}: no matched pair of {counts['left_out']} {wanted}, so there is nothing to compare")
    prefix = "isda" if annotated else "isd"
    metrics = {f"{prefix}_{name}": float(torch.cat([row[name] for row in values]).mean()) for name in values[0]}
    kind = "annotated entities" if annotated else "attention alone"
    return Outcome(f"ISD{'a' * annotated}: distance of relations among words and among regions, by {kind}, in nats", metrics, {}, counts)


def _matched_pairs(
    matcher: Matcher, split_uri: str, batch_size: int, device: str | torch.device, problems: list[Problem]
) -> Iterator[tuple[list[Caption], Relations]]:
    matcher.check_relations()
    for uri, sha256 in shards_of(split_uri):
        for batch in batches(read_samples(uri, sha256), batch_size, None, problems):
            samples, prepared = prepare(matcher.inputs, batch, files.name_of(uri), problems)
            if not samples:
                continue
            images = Images.cat(prepared)
            pairs = [(row, caption) for row, sample in enumerate(samples) for caption in sample.captions]
            for start in range(0, len(pairs), batch_size):
                rows, captions = zip(*pairs[start : start + batch_size], strict=True)
                texts = matcher.inputs.captions([caption.text for caption in captions])
                yield list(captions), matcher.relations(images[torch.tensor(rows)].to(device), texts.to(device))[2]


def _isda(captions: list[Caption], relations: Relations) -> dict[str, Tensor]:
    """sum (G',), mean (G',) of the captions that name at least two entities."""
    entities = [cast(list[Entity], caption.meta.get("entities") or []) for caption in captions]
    rows = [row for row, found in enumerate(entities) if len(found) > 1]
    most = max((len(entities[row]) for row in rows), default=0)
    sides: dict[str, Tensor] = {}
    for side, mask in (("words", relations.word_mask), ("regions", relations.region_mask)):
        members = sides[side] = torch.zeros(len(rows), most, mask.shape[1], device=mask.device)
        for place, row in enumerate(rows):
            for number, entity in enumerate(entities[row]):
                named = entity[side]
                wrong = [i for i in named if not (0 <= i < mask.shape[1] and mask[row, i])]
                if wrong or not named:
                    have = int(mask[row].sum())
                    raise ValueError(f"caption {captions[row].id}: entity {number} names {side} {named}, the pair has {have} {side}")
                members[place, number, named] = 1.0
    if not rows:
        return {"sum": torch.zeros(0), "mean": torch.zeros(0)}
    found = isda(relations.blocks[0][rows], relations.blocks[1][rows], sides["words"], sides["regions"])
    return {"sum": found.sum, "mean": found.mean}
