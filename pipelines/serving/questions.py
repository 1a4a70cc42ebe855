"""The bodies of the API, version 1: what is asked and what is answered. `openapi.json` is made of these classes."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.serving.limits import Limits
from pipelines.serving.refusals import Refused

MOST_FILTERS, MOST_VALUES, LONGEST_VALUE = 16, 64, 256
MAX_OFFSET = 10_000


class Ask(BaseModel):
    """A question. `text`, `image` or both, or `like`: the key of an image of the index."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(None, description="what to look for")
    image: str | None = Field(None, description="base64 of an image file, or a data: URI; addresses are never opened")
    like: str | None = Field(None, max_length=1024, description="the key of an image of the index, to be used as the image")
    find: Literal["images", "captions"] | None = Field(None, description="unset: images for a text, captions for an image alone")
    k: int = Field(20, ge=1, description="answers")
    offset: int = Field(0, ge=0, le=MAX_OFFSET, description="answers to leave out: the page before")
    where: dict[str, list[str]] = Field({}, description="field -> values, one of which an answer must have")
    min_score: float | None = Field(None, ge=0, le=1, description="the least probability of a true match; needs a calibrated index")
    model: str | None = Field(None, max_length=256, description="which of the served models; unset: the first")
    version: str | None = Field(None, max_length=256, description="409 unless this version is served: for paging through one list")


class Batch(BaseModel):
    """Several questions in one request; each is answered, or refused, by itself."""

    model_config = ConfigDict(extra="forbid")

    questions: list[Ask] = Field(min_length=1)


class Why(BaseModel):
    """Where the words of a text look in an image of the index."""

    model_config = ConfigDict(extra="forbid")

    text: str
    key: str = Field(max_length=1024)
    model: str | None = Field(None, max_length=256)


class Answer(BaseModel):
    """probability: that this is a true match, of a calibrated index; photo: address of the image, null where the index has none."""

    rank: int
    score: float
    probability: float | None
    key: str
    shard: str
    captions: list[str]
    metadata: dict[str, Any]
    photo: str | None


class Answers(BaseModel):
    """total: images (or captions) that were searched after the filters; nothing_found: `min_score` left nothing."""

    model: str
    version: str
    find: Literal["images", "captions"]
    total: int
    nothing_found: bool
    answers: list[Answer]


class Fault(BaseModel):
    """Every refusal has this form."""

    error: str = Field(description="what is wrong")
    remedy: str = Field(description="what to do about it")


class Replies(BaseModel):
    """One entry a question, in their order."""

    replies: list[Answers | Fault]


class Looks(BaseModel):
    """words (T), weights (T,R) of each word over the regions or patches, boxes (R,4) x1 y1 x2 y2 in pixels of the image."""

    words: list[str]
    weights: list[list[float]]
    boxes: list[list[float]]
    width: int
    height: int


class Served(BaseModel):
    """A served model. fields: what can be filtered by, and the most frequent values; problem: why a newer version was refused."""

    name: str
    version: str
    kind: str
    images: int
    captions: int
    fields: dict[str, list[str]]
    calibrated: bool
    explains: bool
    asks: list[str] = Field(description="what a question may hold: text, image")
    problem: str | None


class Models(BaseModel):
    models: list[Served]


def parsed(kind: type[BaseModel], body: bytes) -> Any:
    """The body as `kind`. Raises Refused: 400 for what is no JSON, 422 naming the field that does not fit."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise Refused(400, f"the body is no JSON: {first['msg'][:200]}", "send a JSON object; /v1/docs shows examples") from None
        where = ".".join(str(part)[:64] for part in first["loc"]) or "the body"
        raise Refused(422, f"{where}: {first['msg'][:200]}", f"the fields are {', '.join(kind.model_fields)}; see /v1/docs") from None


def check(ask: Ask, limits: Limits) -> bytes | None:
    """The image of the question, decoded from base64. Raises Refused for what is beyond the limits or does not fit together."""
    if ask.like is not None and ask.image is not None:
        raise Refused(422, "a question holds `image` or `like`, not both", "leave one of them out")
    if ask.text is None and ask.image is None and ask.like is None:
        raise Refused(422, "the question is empty", "give `text`, `image` or `like`")
    if ask.text is not None:
        limits.check_text(ask.text)
    if ask.k > limits.answers:
        raise Refused(422, f"k is {ask.k:,}, the limit is {limits.answers:,}", "ask for less, and go on with `offset`")
    if len(ask.where) > MOST_FILTERS or any(len(values) > MOST_VALUES for values in ask.where.values()):
        raise Refused(422, "too many filters", f"at most {MOST_FILTERS} fields with {MOST_VALUES} values each")
    if any(len(text) > LONGEST_VALUE for name, values in ask.where.items() for text in (name, *values)):
        raise Refused(422, "a name or value of `where` is too long", f"at most {LONGEST_VALUE} characters each")
    for text in (ask.like or "", *ask.where, *(value for values in ask.where.values() for value in values)):
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text):
            raise Refused(422, "a key or filter holds control characters", "send it as /v1/search and /v1/models gave it")
    if ask.image is None:
        return None
    data = _decoded(ask.image)
    limits.check_image(data)
    return data


def _decoded(text: str) -> bytes:
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise Refused(415, "a data: URI that is not base64", "write data:image/jpeg;base64,...")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(
            415, "`image` is no base64 of a file", "send the bytes of the file as base64: paths and addresses are never opened"
        ) from None
