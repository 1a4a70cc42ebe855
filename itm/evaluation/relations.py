"""ISD and ISDa of IAIS: how far relations among words and among regions of matched pairs differ. Lower is more consistent.

Definitions: docs/methods/iais.md#relation-distance.

ISDa needs annotation: each caption's metadata holds `entities`, a list of {"words": [...], "regions": [...]}, positions from 0 of tokens
of the matcher's tokenizer (start and end not counted) and of regions; or, as the source flickr30k_entities writes them, with "spans"
[[start, end], ...], characters of the caption, in place of words, which become the positions of their tokens here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

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

Entity = dict[str, Any]
"""`words` (or `spans`) and `regions` of one annotated entity."""
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
    matcher: Matcher,
    split_uri: str,
    annotated: bool,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    limit: int | None = None,
) -> Outcome:
    """Means over every matched pair of a split: isd_{L,V}_{singular,distributed}, or isda_sum and isda_mean where `annotated`.

    limit: of the first so many images alone.
    Raises ValueError for a matcher without words and regions, and for ISDa where no caption names two entities.
    """
    values: list[dict[str, Tensor]] = []
    counts = {"pairs": 0, "left_out": 0, "rejected": 0}
    problems: list[Problem] = []
    with scoring_mode(matcher, device):
        for captions, relations in _matched_pairs(matcher, split_uri, batch_size, device, problems, limit):
            if annotated:
                found = _isda(captions, relations, matcher.inputs.tokenizer, counts)
            else:
                found = isd(relations.blocks, relations.word_mask, relations.region_mask)
            values.append({name: value.double().cpu() for name, value in found.items()})
            used = len(next(iter(found.values())))
            counts["pairs"] += used
            counts["left_out"] += len(captions) - used
    counts["rejected"] = len(problems)
    if not counts["pairs"]:
        wanted = "names two entities in its metadata `entities`" if annotated else "has both words and regions"
        raise ValueError(f"{split_uri}: no matched pair of {counts['left_out']} {wanted}, so there is nothing to compare")
    prefix = "isda" if annotated else "isd"
    metrics = {f"{prefix}_{name}": float(torch.cat([row[name] for row in values]).mean()) for name in values[0]}
    kind = "annotated entities" if annotated else "attention alone"
    return Outcome(f"ISD{'a' * annotated}: distance of relations among words and among regions, by {kind}, in nats", metrics, {}, counts)


def check_annotated(split_uri: str) -> None:
    """Raises ValueError when no caption of the first shard of a split names two entities: the split was packed without annotation."""
    uri, sha256 = shards_of(split_uri)[0]
    samples = (sample for sample in read_samples(uri, sha256) if not isinstance(sample, Problem))
    if not any(len(caption.meta.get("entities") or []) > 1 for sample in samples for caption in sample.captions):
        raise ValueError(
            f"{split_uri}: no caption of its first shard names two entities, which ISDa compares: pack it with flickr30k_entities"
        )


def _matched_pairs(
    matcher: Matcher, split_uri: str, batch_size: int, device: str | torch.device, problems: list[Problem], limit: int | None
) -> Iterator[tuple[list[Caption], Relations]]:
    matcher.check_relations()
    taken = 0
    for uri, sha256 in shards_of(split_uri):
        for batch in batches(read_samples(uri, sha256), batch_size, None if limit is None else limit - taken, problems):
            samples, prepared = prepare(matcher.inputs, batch, files.name_of(uri), problems)
            taken += len(samples)
            if not samples:
                continue
            images = Images.cat(prepared)
            pairs = [(row, caption) for row, sample in enumerate(samples) for caption in sample.captions]
            for start in range(0, len(pairs), batch_size):
                rows, captions = zip(*pairs[start : start + batch_size], strict=True)
                texts = matcher.inputs.captions([caption.text for caption in captions])
                yield list(captions), matcher.relations(images[torch.tensor(rows)].to(device), texts.to(device))[2]


def _isda(captions: list[Caption], relations: Relations, tokenizer: Any, counts: dict[str, int]) -> dict[str, Tensor]:
    """sum (G',), mean (G',) of the captions that name at least two entities; counts: gets those of spans that are left out."""
    entities = []
    for row, caption in enumerate(captions):
        said = cast(list[Entity], caption.meta.get("entities") or [])
        kept = placed(said, caption.text, tokenizer, int(relations.word_mask[row].sum()), int(relations.region_mask[row].sum()))
        if len(said) > len(kept):
            counts["entities_left_out"] = counts.get("entities_left_out", 0) + len(said) - len(kept)
        entities.append(kept)
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


def placed(entities: list[Entity], text: str, tokenizer: Any, words: int, regions: int) -> list[Entity]:
    """Entities with `words` for `spans`. What lies behind the words and regions that the matcher reads is cut off; an entity of spans that
    keeps no word or no region (it has no box, or none on a region) is left out.

    A span's words are those that the caption has up to its end and has not up to its start, as the tokenizer counts them.
    """
    kept, counted = [], _Counted(text, tokenizer)
    for entity in entities:
        if "spans" not in entity:
            kept.append(entity)
            continue
        own = sorted({word for start, end in entity["spans"] for word in range(counted[start], min(counted[end], words))})
        seen = [region for region in entity["regions"] if region < regions]
        if own and seen:
            kept.append({"words": own, "regions": seen})
    return kept


class _Counted(dict[int, int]):
    """How many tokens the first so many characters of a caption have, start and end not counted."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        super().__init__()
        self.text, self.tokenizer = text, tokenizer

    def __missing__(self, end: int) -> int:
        cut = self.tokenizer.truncated
        try:
            self[end] = int(self.tokenizer([self.text[:end]])[1].sum()) - 2 if self.text[:end].strip() else 0
        except ValueError:  # nothing is left of it after the clean-up
            self[end] = 0
        self.tokenizer.truncated = cut  # no caption of the split was cut here
        return self[end]
