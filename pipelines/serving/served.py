"""A model that is served: matcher, index and engine, and how the ones of a moved alias take their place without a gap."""

from __future__ import annotations

import io
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

import itm
from itm.data import files
from itm.data.pixels import decode
from itm.data.shards import read_manifest
from itm.evaluation.dataset import encode_split, exact_relevance
from itm.matchers.weights import weights_hash
from itm.retrieval.calibration import Calibration, calibrate, load_calibration, write_calibration
from itm.retrieval.engine import Engine, Hits, Question
from itm.retrieval.index import Index
from itm.types import Matcher
from pipelines.serving.questions import Answer, Answers, Looks
from pipelines.serving.questions import Served as Said
from pipelines.serving.refusals import Refused

log = logging.getLogger("itm.serve")
AGAIN = 60.0  # seconds after which a version that was refused is tried once more
FACETS, VALUES = 12, 30  # fields that the page offers to filter by, and values of each
THUMBNAIL, LARGEST = 320, 1600  # pixels of the longer side
CACHED = 2_000  # thumbnails


@dataclass(frozen=True)
class Place:
    """What a model is made from. name: as clients call it; model, index, shards: URIs; rerank: candidates that are scored exactly;
    calibrate: a validation split on which a version without a calibration gets one. `{version}` in index: the number of the version."""

    name: str
    model: str
    index: str | None = None
    shards: str | None = None
    allow: tuple[str, ...] = ()
    device: str = "auto"
    rerank: int | None = None
    calibrate: str | None = None


@dataclass(frozen=True)
class Asked:
    """A question; like: the key of the image that it asks by; version: that it must be answered by, None = any."""

    question: Question
    like: str | None = None
    version: str | None = None


@dataclass(eq=False)
class Loaded:
    """One version of a model with the index that fits it."""

    version: str
    stamp: float
    matcher: Matcher
    index: Index
    engine: Engine

    def __post_init__(self) -> None:
        self.jpeg = lru_cache(CACHED)(self._jpeg)  # of this object, so that it goes with it
        self.alone = threading.Lock()  # tokenizers take no two threads at once

    def _jpeg(self, key: str, side: int) -> bytes:
        image = self.index.sample(key).image
        if image is None:
            raise ValueError("its shard holds regions alone")
        picture = decode(image)
        picture.thumbnail((side, side))
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=85)
        return out.getvalue()

    @cached_property
    def facets(self) -> dict[str, list[str]]:
        """Fields to filter by, each with its most frequent values; without any where there are too many, as of sizes and dates."""
        found: dict[str, list[str]] = {}
        for name, column in self.index.columns.items():
            if name == "key" or len(found) == FACETS:
                continue
            counts: Counter[Any] = Counter(value for value in column.to_pylist() if value is not None)
            if counts and all(isinstance(value, str | int | float) for value in counts):
                found[name] = [str(value) for value, _ in counts.most_common()] if len(counts) <= VALUES else []
        return found

    def total(self, question: Question) -> int:
        """Images, or captions, that the question searches."""
        if not question.where:
            return self.counts[question.find]
        rows = self.index.rows(question.find, question.where)
        return self.counts[question.find] if rows is None else len(rows)

    @cached_property
    def counts(self) -> dict[str, int]:
        return {"images": len(self.index), "captions": self.index.caption_count}

    @property
    def explains(self) -> bool:
        """Whether the matcher has weights of words over parts, as its class says."""
        return any(type(member).attention is not Matcher.attention for member in self.matcher.averaged)


class ServedModel:
    """Answers by the version that is there now; `refresh` looks for a newer one. Safe to use from several threads: `now` is swapped whole.

    Raises ValueError where the model or its index cannot be served.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.problem = place, ""
        version = version_of(place.model)
        self.now = load(place, version)
        self.tried, self.tried_at = (self.now.version, self.now.stamp), time.monotonic()

    def refresh(self) -> bool:
        """Takes a moved alias or a grown index into service; returns whether it did. The old one answers until the new one can, and goes
        on where the new one is refused: `problem` says why."""
        try:
            version = version_of(self.place.model)
            found = version or self.now.version, stamp_of(at(self.place, version))
        except Exception as error:  # a registry or a store that does not answer is no reason to stop
            self.problem = f"cannot look for a newer version: {error}"
            return False
        if found == (self.now.version, self.now.stamp):
            self.problem = ""
            return False
        if found == self.tried and time.monotonic() - self.tried_at < AGAIN:
            return False
        self.tried, self.tried_at = found, time.monotonic()
        try:
            self.now = load(self.place, version)
        except Exception as error:
            self.problem = f"version {found[0]} is refused, version {self.now.version} goes on: {error}"
            log.error("%s: %s", self.place.name, self.problem)
            return False
        self.problem = ""
        log.warning("%s: version %s is served now", self.place.name, self.now.version)
        return True

    def answer(self, asked: Sequence[Asked]) -> list[Answers | Refused]:
        """As many replies as questions, in their order; a question that cannot be answered harms no other one."""
        now = self.now
        prepared = [_prepared(now, one) for one in asked]
        good = [n for n, question in enumerate(prepared) if isinstance(question, Question)]
        replies: dict[int, Answers | Refused] = {n: q for n, q in enumerate(prepared) if isinstance(q, Refused)}
        with now.alone:
            found = _answers(now, [q for q in prepared if isinstance(q, Question)])
        for number, hits in zip(good, found, strict=True):
            question = prepared[number]
            assert isinstance(question, Question)
            replies[number] = hits if isinstance(hits, Refused) else self._told(now, question, hits)
        return [replies[number] for number in range(len(asked))]

    def _told(self, now: Loaded, question: Question, hits: Hits) -> Answers:
        answers = [
            Answer(
                rank=hit.rank,
                score=round(hit.score, 6),
                probability=None if hit.probability is None else round(hit.probability, 4),
                key=hit.key,
                shard=files.name_of(hit.shard),
                captions=hit.captions,
                metadata={name: value for name, value in hit.metadata.items() if isinstance(value, str | int | float | bool)},
                photo=None,
            )
            for hit in hits.hits
        ]
        nothing = not answers and question.offset == 0
        return Answers(
            model=self.place.name,
            version=now.version,
            find=question.find,
            total=now.total(question),
            nothing_found=nothing,
            answers=answers,
        )

    def explain(self, text: str, key: str) -> Looks:
        """Raises Refused for a key that is not there, and where there is nothing to show."""
        now = self.now
        _check_key(now, key)
        try:
            with now.alone:
                found = now.engine.explain(Question(text=text), key)
        except (ValueError, OSError) as error:
            raise Refused(422, plain(error), "ask a late-interaction or joint matcher (scan, sgr, saf, uarda, uniter)") from None
        weights = [[round(value, 5) for value in row] for row in found.weights]
        boxes = [[round(float(value), 2) for value in box] for box in found.boxes]
        return Looks(words=list(found.words), weights=weights, boxes=boxes, width=found.width, height=found.height)

    def photo(self, key: str, large: bool) -> bytes:
        """A JPEG without the metadata of the file. Raises Refused for a key that is not there, or has no photo."""
        now = self.now
        _check_key(now, key)
        try:
            return now.jpeg(key, LARGEST if large else THUMBNAIL)
        except (ValueError, OSError) as error:
            raise Refused(
                404, f"no photo of {key!r} can be shown: {plain(error)}", "the index holds it; its shard may have moved"
            ) from None

    def said(self) -> Said:
        """What a client is told about the model."""
        now = self.now
        asks = ["text"] + ["image"] * (now.matcher.inputs.image.kind != "regions")
        return Said(
            name=self.place.name,
            version=now.version,
            kind=now.matcher.kind,
            images=now.counts["images"],
            captions=now.counts["captions"],
            fields=now.facets,
            calibrated=now.engine.calibration is not None,
            explains=now.explains,
            asks=asks,
            problem=plain(self.problem) or None,
        )


def plain(error: Exception | str) -> str:
    """The message without the folders of this machine or its stores: what a client may read."""
    return re.sub(r"(?:\w+://|/)(?:[^\s:;,'\"]*/)+", "", str(error))[:500]


def version_of(uri: str) -> str:
    """The version behind `models:/name@alias`; '' for an address that always means the same. Raises ValueError for an unknown alias."""
    if not (found := re.fullmatch(r"models:/([^@/]+)@[^@/]+", uri)):
        return ""
    from itm.tracking.registry import find_version

    return f"{found[1]}/{find_version(uri).version}"


def at(place: Place, version: str) -> Place:
    """The place of one version."""
    number = version.rpartition("/")[2] or place.model.rstrip("/").rpartition("/")[2]
    return place if place.index is None else replace(place, index=place.index.replace("{version}", number))


def stamp_of(place: Place) -> float:
    """When the index was last written; 0 where it is made from shards."""
    told = files.join(place.index, "index.json") if place.index else ""
    return files.modified(told) if told and files.exists(told) else 0.0


def load(place: Place, version: str) -> Loaded:
    """Matcher, index and engine. Raises ValueError, naming both, where the index does not fit the matcher."""
    place = at(place, version)
    stamp = stamp_of(place)
    matcher = itm.load_matcher(f"models:/{version}" if version else place.model, allow=place.allow)
    index = _index(place, matcher)
    engine = Engine(matcher, index, place.device, place.rerank)
    engine.calibration = _calibration(place, matcher, index, engine.device)
    loaded = Loaded(version or weights_hash(matcher), stamp, matcher, index, engine)
    engine.answer([Question(text="a", k=1)])  # the first answer is slow, and shows whether there are any
    return loaded


def _index(place: Place, matcher: Matcher) -> Index:
    """The index, or one that is made beside it from the shards where it is of another matcher."""
    if place.index:
        try:
            return Index.open(place.index, matcher)
        except ValueError:
            if not place.shards:
                raise
    if not place.shards:
        raise ValueError(f"{place.name}: nothing to search: give --index, or --shards to make one from")
    return Index.of_shards(matcher, place.shards, uni=bool(matcher.uni_width))


def _calibration(place: Place, matcher: Matcher, index: Index, device: torch.device) -> Calibration | None:
    """What lies beside the index, or is made now; None where nobody asked for one."""
    folder = place.index or files.join(str(place.shards), "index")
    found = load_calibration(folder, index)
    if found is None and place.calibrate:
        split = encode_split(matcher, place.calibrate, device=device)
        told = calibrate(
            matcher, split, index.identity.matcher, device, exact_relevance(read_manifest(place.calibrate).source, split.names)
        )
        log.warning("%s: calibrated on %s\n%s", place.name, place.calibrate, told)
        write_calibration(folder, told)
        found = told.sized(index)
    return found


def _prepared(now: Loaded, asked: Asked) -> Question | Refused:
    """The question with the image that it asks by."""
    if asked.version is not None and asked.version != now.version:
        return Refused(409, f"version {asked.version} is not served any more, {now.version} is", "ask again from the first page")
    if asked.like is None:
        return asked.question
    try:
        _check_key(now, asked.like)
        sample = now.index.sample(asked.like)
    except Refused as refused:
        return refused
    except (ValueError, OSError) as error:
        return Refused(404, f"image {asked.like!r} cannot be read: {plain(error)}", "ask by another image")
    data = sample.regions if now.matcher.inputs.image.kind == "regions" else sample.image
    if data is None:
        return Refused(422, f"image {asked.like!r} has nothing that this matcher reads", "ask by another image")
    return replace(asked.question, image=data)


def _answers(now: Loaded, questions: Sequence[Question]) -> list[Hits | Refused]:
    """All at once, or one by one where one of them cannot be answered."""
    if not questions:
        return []
    try:
        return list(now.engine.answer(questions))
    except (ValueError, OSError):
        return [_alone(now, question) for question in questions]


def _alone(now: Loaded, question: Question) -> Hits | Refused:
    try:
        return now.engine.answer([question])[0]
    except ValueError as error:
        if question.image is not None and (fault := _unreadable(question.image, now)):
            return fault
        return Refused(422, plain(error), "change the question; /v1/models says what each model can answer")
    except OSError as error:
        return Refused(503, f"the index cannot be read: {plain(error)}", "ask again later", 30)


def _unreadable(image: bytes, now: Loaded) -> Refused | None:
    if now.matcher.inputs.image.kind == "regions":
        return None
    try:
        decode(image)
    except ValueError as error:
        return Refused(415, str(error), "send a whole JPEG, PNG, WebP, GIF, BMP or TIFF file")
    return None


def _check_key(now: Loaded, key: str) -> None:
    try:
        now.index.row_of(key)
    except ValueError as error:
        raise Refused(404, plain(error), "take a key that /v1/search gave") from None
