"""A split of shards as a matcher sees it: every image and every caption encoded once, with their ids, texts and metadata.

What cannot be read or decoded comes back as quarantine rows (`problems`), never silently.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from itm.data import files
from itm.data.ahead import ahead
from itm.data.formats import Json
from itm.data.manifest import full_key
from itm.data.records import Caption, Problem
from itm.data.same_image import image_of
from itm.data.shards import Manifest, Sample, read_manifest, read_samples
from itm.data.sources import SOURCES
from itm.device import resolve_device
from itm.evaluation.scoring import encode_rows, scoring_mode
from itm.kinds import find_part
from itm.precision import computing
from itm.types import Encoded, Images, Matcher, MatcherInputs


@dataclass(frozen=True)
class Names:
    """What is known of the rows besides vectors: images in order, captions in order, and which image each caption describes.

    caption_image (T,) int64 is the row of the image in `image_keys`. image_of: what is equal for rows of one image
    (`itm.data.same_image`).
    """

    image_keys: list[str]
    caption_ids: list[str]
    caption_image: Tensor
    texts: list[str] = field(default_factory=list)
    image_metas: list[Json] = field(default_factory=list)
    caption_metas: list[Json] = field(default_factory=list)
    image_shards: list[str] = field(default_factory=list)
    image_of: list[str] = field(default_factory=list)

    @property
    def positives(self) -> tuple[Tensor, Tensor]:
        """Truth by ids, as `retrieval_metrics` takes it."""
        return torch.arange(len(self.image_keys)), self.caption_image

    def check(self) -> None:
        """Raises ValueError, with counts and the first offender, for duplicate ids, images without caption, captions without image."""
        for what, ids in (("image key", self.image_keys), ("caption id", self.caption_ids)):
            twice = [name for name, count in Counter(ids).items() if count > 1]
            if twice:
                raise ValueError(f"{len(twice)} {what}s occur more than once, the first is {twice[0]!r}; ids must be unique in a split")
        lost = ((self.caption_image < 0) | (self.caption_image >= len(self.image_keys))).nonzero()[:, 0].tolist()
        if lost:
            raise ValueError(f"{len(lost)} of {len(self.caption_ids)} captions have no image, the first is {self.caption_ids[lost[0]]!r}")
        counts = torch.bincount(self.caption_image, minlength=len(self.image_keys))
        bare = (counts == 0).nonzero()[:, 0].tolist()
        if bare:
            raise ValueError(f"{len(bare)} of {len(self.image_keys)} images have no caption, the first is {self.image_keys[bare[0]]!r}")


@dataclass(frozen=True)
class EncodedSplit:
    """A split, or a shard of it, encoded on the CPU. copies: samples whose image another sample shows, which has their captions."""

    images: Encoded
    captions: Encoded
    names: Names
    problems: list[Problem] = field(default_factory=list)
    copies: int = 0

    @property
    def positives(self) -> tuple[Tensor, Tensor]:
        return self.names.positives

    @classmethod
    def cat(cls, pieces: Sequence[EncodedSplit]) -> EncodedSplit:
        """Join shards in order; the caption -> image rows are shifted to the joined order. At least one shard holds an image."""
        full = [p for p in pieces if p.names.image_keys]
        said = [p.captions for p in full if p.names.caption_ids]
        captions = Encoded.cat(said) if said else Encoded()
        return cls(
            Encoded.cat([p.images for p in full]),
            captions,
            join_names([p.names for p in full]),
            [row for p in pieces for row in p.problems],
        )


def merged(split: EncodedSplit) -> EncodedSplit:
    """Each image once, with the captions of all its samples behind one another: else its copies would be negatives of each other."""
    names, first = split.names, dict[str, int]()
    owner = torch.tensor([first.setdefault(image, row) for row, image in enumerate(names.image_of)], dtype=torch.int64)
    if len(first) == len(names.image_keys):
        return split
    kept = torch.tensor(list(first.values()), dtype=torch.int64)
    image = torch.searchsorted(kept, owner[names.caption_image])
    order = image.argsort(stable=True)
    by_image = {name: _taken(getattr(names, name), kept) for name in ("image_keys", "image_metas", "image_shards", "image_of")}
    by_caption = {name: _taken(getattr(names, name), order) for name in ("caption_ids", "texts", "caption_metas")}
    together = replace(names, caption_image=image[order], **by_image, **by_caption)
    return EncodedSplit(split.images[kept], split.captions[order], together, split.problems, len(owner) - len(kept))


def _taken(values: list[Any], rows: Tensor) -> list[Any]:
    return [values[row] for row in rows.tolist()] if values else []


def told_apart(names: Names) -> Names:
    """Keys, and ids of captions, that several shards use get the name of their shard in front."""
    if not names.image_shards:
        return names
    shards = names.image_shards
    ids = _told_apart(names.caption_ids, [shards[row] for row in names.caption_image.tolist()])
    return replace(names, image_keys=_told_apart(names.image_keys, shards), caption_ids=ids)


def _told_apart(ids: list[str], shards: list[str]) -> list[str]:
    users: dict[str, set[str]] = {}
    for name, shard in zip(ids, shards, strict=True):
        users.setdefault(name, set()).add(shard)
    return [full_key(shard, name) if len(users[name]) > 1 else name for name, shard in zip(ids, shards, strict=True)]


def names_of(images: int, caption_image: Tensor, image_keys: list[str] | None = None, caption_ids: list[str] | None = None) -> Names:
    """Names of a bare score matrix: rows and columns are numbered unless they are named."""
    return Names(
        image_keys or [str(row) for row in range(images)], caption_ids or [str(row) for row in range(len(caption_image))], caption_image
    )


def join_names(pieces: Sequence[Names]) -> Names:
    joined: Json = {}
    for name in Names.__dataclass_fields__:
        joined[name] = [row for piece in pieces for row in getattr(piece, name)] if name != "caption_image" else None
    starts = torch.tensor([0, *(len(p.image_keys) for p in pieces)]).cumsum(0)
    joined["caption_image"] = torch.cat([p.caption_image + start for p, start in zip(pieces, starts.tolist(), strict=False)])
    return Names(**joined)


def encode_split(
    matcher: Matcher,
    split_uri: str,
    batch_size: int = 256,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    max_reject_rate: float = 1.0,
    bare: bool = False,
) -> EncodedSplit:
    """Encode the first `limit` images (unset: all) of a split with their captions, shard after shard, in this process.

    matcher: as `itm.load_matcher` gives it, with `.inputs`. bare: images without captions are taken, too.
    Raises ValueError when a larger share than `max_reject_rate` is rejected.
    """
    pieces: list[EncodedSplit] = []
    for uri, sha256 in shards_of(split_uri):
        left = None if limit is None else limit - sum(len(p.names.image_keys) for p in pieces)
        if left is not None and left <= 0:
            break
        pieces.append(encode_shard(matcher, uri, sha256, batch_size, left, device, bare))
    return checked(pieces, split_uri, max_reject_rate)


def shards_of(split_uri: str, manifest: Manifest | None = None) -> list[tuple[str, str]]:
    """URI, and sha256 by its manifest, of every shard of a split."""
    return [(files.join(split_uri, shard.name), shard.sha256) for shard in (manifest or read_manifest(split_uri)).shards]


def checked(pieces: Sequence[EncodedSplit], split_uri: str, max_reject_rate: float) -> EncodedSplit:
    """Join the shards of a split, each image once. Raises ValueError when nothing is left or too much was rejected."""
    problems = [problem for piece in pieces for problem in piece.problems if problem.what in ("sample", "shard")]
    kept = sum(len(piece.names.image_keys) for piece in pieces)
    total = kept + len(problems)
    if (problems and len(problems) > max_reject_rate * total) or not kept:
        first = f"; the first is {problems[0].key!r} in {problems[0].shard}: {problems[0].reason}" if problems else ""
        raise ValueError(f"{split_uri}: {len(problems)} of {total} samples were rejected (limit {max_reject_rate:.1%}){first}")
    whole = EncodedSplit.cat(pieces)
    return merged(replace(whole, names=told_apart(whole.names)))


def encode_shard(
    matcher: Matcher,
    shard_uri: str,
    sha256: str,
    batch_size: int = 256,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    bare: bool = False,
) -> EncodedSplit:
    """Encode one shard with the deterministic preparation of `matcher.inputs`; it may turn out to hold no image, only problems.

    bare: images without captions are taken, too; else they are problems.
    Raises ValueError when the shard has another sha256.
    """
    where, items = resolve_device(device), read_samples(shard_uri, sha256)
    with computing("fp32", where):
        return encode_samples(matcher, shard_uri, items if bare else captioned(items, shard_uri), batch_size, limit, where)


def encode_samples(
    matcher: Matcher, shard_uri: str, items: Iterable[Sample | Problem], batch_size: int, limit: int | None, device: torch.device
) -> EncodedSplit:
    """What `encode_shard` does with the samples of a shard, in the precision that the caller has set (`itm.precision.computing`)."""
    problems: list[Problem] = []
    samples: list[Sample] = []
    images: list[Encoded] = []
    shard = files.name_of(shard_uri)
    inputs = copy.copy(matcher.inputs)
    inputs.target = torch.device("cpu")  # the thread that decodes leaves the device to this one
    with scoring_mode(matcher, device):
        read = batches(items, batch_size, limit, problems)
        for good, prepared in ahead(prepare(inputs, batch, shard, problems) for batch in read):
            samples += good
            images += [encode_rows(matcher, rows, batch_size, device) for rows in prepared]
        try:
            encoded = _encode_captions(matcher, samples, batch_size, device)
        except ValueError:
            rows, samples = _readable(matcher.inputs, samples, shard, problems)
            images = [Encoded.cat(images)[torch.tensor(rows, dtype=torch.int64)]]
            encoded = _encode_captions(matcher, samples, batch_size, device)
    left, right = (Encoded.cat(pieces) if pieces else Encoded() for pieces in (images if samples else [], encoded))
    return EncodedSplit(left, right, _names(samples, shard_uri), problems)


def captioned(items: Iterable[Sample | Problem], shard_uri: str) -> Iterator[Sample | Problem]:
    """Images without captions answer no question of an evaluation: they become problems."""
    shard = files.name_of(shard_uri)
    for item in items:
        yield item if isinstance(item, Problem) or item.captions else Problem(item.key, shard, "evaluate", "no caption")


def _encode_captions(matcher: Matcher, samples: Sequence[Sample], batch_size: int, device: str | torch.device) -> list[Encoded]:
    captions = [caption for sample in samples for caption in sample.captions]
    return [_encode_texts(matcher, captions[i : i + batch_size], device) for i in range(0, len(captions), batch_size)]


def _readable(inputs: MatcherInputs, samples: Sequence[Sample], shard: str, problems: list[Problem]) -> tuple[list[int], list[Sample]]:
    """The samples with a caption that can be tokenised, with those captions alone, and their rows; the others are added to `problems`."""
    rows: list[int] = []
    left: list[Sample] = []
    for row, sample in enumerate(samples):
        good: list[Caption] = []
        for caption in sample.captions:
            try:
                inputs.captions([caption.text])
                good.append(caption)
            except ValueError as error:
                problems.append(Problem(sample.key, shard, "evaluate", f"caption {caption.id}: {error}", "caption"))
        if good or not sample.captions:
            rows.append(row)
            left.append(replace(sample, captions=good))
        else:
            problems.append(Problem(sample.key, shard, "evaluate", "no caption that can be read"))
    return rows, left


def encode_texts(matcher: Matcher, texts: Sequence[str], batch_size: int = 256, device: str | torch.device = "cpu") -> Encoded:
    """Encode strings, `batch_size` a call."""
    captions = [Caption("", text) for text in texts]
    where = resolve_device(device)
    with scoring_mode(matcher, where), computing("fp32", where):
        return Encoded.cat([_encode_texts(matcher, captions[i : i + batch_size], where) for i in range(0, len(texts), batch_size)])


def _encode_texts(matcher: Matcher, captions: Sequence[Caption], device: str | torch.device) -> Encoded:
    return encode_rows(matcher, matcher.inputs.captions([c.text for c in captions]), len(captions), device)


def batches(items: Iterable[Sample | Problem], size: int, limit: int | None, problems: list[Problem]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    taken = 0
    for item in items:
        if isinstance(item, Problem):
            problems.append(item)
            continue
        if limit is not None and taken >= limit:
            break
        batch.append(item)
        taken += 1
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def prepare(inputs: MatcherInputs, batch: list[Sample], shard: str, problems: list[Problem]) -> tuple[list[Sample], list[Images]]:
    """One `Images` for the batch; when one of its images is bad, one each, and a quarantine row for the bad ones."""
    regions = inputs.image.kind == "regions"
    raw = [sample.regions if regions else sample.image for sample in batch]
    whole = [data for data in raw if data is not None]
    try:
        if len(whole) == len(raw):
            return batch, [inputs.images(whole)]
    except ValueError:
        pass
    good: list[Sample] = []
    prepared: list[Images] = []
    for sample, data in zip(batch, raw, strict=True):
        try:
            if data is None:
                raise ValueError(f"the sample has no {'region file' if regions else 'image'}")
            prepared.append(inputs.images([data]))
            good.append(sample)
        except ValueError as error:
            problems.append(Problem(sample.key, shard, "evaluate", str(error), captions=len(sample.captions)))
    return good, prepared


def _names(samples: list[Sample], shard_uri: str) -> Names:
    captions = [caption for sample in samples for caption in sample.captions]
    rows = torch.tensor([row for row, sample in enumerate(samples) for _ in sample.captions], dtype=torch.int64)
    return Names(
        image_keys=[s.key for s in samples],
        caption_ids=[c.id for c in captions],
        caption_image=rows,
        texts=[c.text for c in captions],
        image_metas=[s.meta for s in samples],
        caption_metas=[c.meta for c in captions],
        image_shards=[shard_uri] * len(samples),
        image_of=[image_of(s) for s in samples],
    )


def exact_relevance(source: str, names: Names) -> Tensor | None:
    """(I,T) bool, all pairs that hold, when the source of the shards can tell; None when it knows annotated pairs only.

    source: `Manifest.source`, which `itm pack` begins with the kind of the source. A source of a user's own is not asked:
    a manifest may come from anyone, and no code is imported by it.
    """
    kind = source.partition(" ")[0]
    if kind not in SOURCES:
        return None
    relevance = find_part(SOURCES, kind, "source").relevance(names.image_metas, names.caption_metas)
    return None if relevance is None else torch.as_tensor(relevance).bool()
