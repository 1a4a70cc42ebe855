"""The HTTP API, version 1, and the page: an ASGI app over a `Backend`.

    app = build(Here([ServedModel(Place("a", "runs/demo/demo/matcher", shards="data/shards/test"))]), Limits(), Access())

A refusal is always {"error": ..., "remedy": ...}. No path or address that a client sends is ever opened.
"""

from __future__ import annotations

import json
from importlib.resources import files as resources
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import itm
from itm.retrieval.engine import Question
from pipelines.serving.backend import Backend
from pipelines.serving.figures import Figures
from pipelines.serving.guard import FAILED, Access, App, Guard
from pipelines.serving.limits import Limits
from pipelines.serving.questions import Answers, Ask, Batch, Fault, Looks, Models, Replies, Why, check, parsed
from pipelines.serving.refusals import Refused
from pipelines.serving.served import Asked

IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff", "application/octet-stream")
KINDS = {"html": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FAULTS: dict[int | str, dict[str, Any]] = {status: {"model": Fault} for status in (400, 401, 404, 409, 413, 415, 422, 429, 503)}
RAW = {name: {"schema": {"type": "string", "format": "binary"}} for name in IMAGE_TYPES[:3]}


def build(backend: Backend, limits: Limits | None = None, access: Access | None = None) -> App:
    """The whole service as one ASGI app, guarded."""
    limits, access, figures = limits or Limits(), access or Access(), Figures()
    about = "Ask by text, image or both; every answer says how sure it is where the index is calibrated. Refusals name a remedy."
    app = FastAPI(title="itm", version=itm.__version__, description=about, docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json")
    app.state.figures = figures
    _faults(app)
    _asking(app, backend, limits, figures)
    _telling(app, backend, figures)
    _page(app)
    return Guard(app, limits, access, figures)


def _asking(app: FastAPI, backend: Backend, limits: Limits, figures: Figures) -> None:
    """The routes that search."""

    async def replies(name: str | None, asked: list[Asked]) -> list[Answers | Refused]:
        model = _model(backend, name)
        found = await backend.answer(model, asked)
        for reply in found:
            if isinstance(reply, Answers):
                figures.answers.labels(model, reply.version).inc()
                figures.nothing.labels(model).inc(reply.nothing_found)
                for answer in reply.answers:
                    answer.photo = f"/v1/images/{quote(answer.key, safe='')}?model={quote(model, safe='')}"
        return found

    body: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": {"schema": Ask.model_json_schema()}} | RAW}}

    @app.post("/v1/search", response_model=Answers, responses=FAULTS, openapi_extra=body, summary="The best answers to one question")
    async def search(request: Request) -> Any:
        """The body is JSON, or the bytes of an image file; then k, offset, find, min_score, model and field filters stand in the query."""
        ask, image = await _ask(request, limits)
        (reply,) = await replies(ask.model, [_asked(ask, image)])
        if isinstance(reply, Refused):
            raise reply
        return reply

    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema(Batch)}}}}

    @app.post("/v1/batch", response_model=Replies, responses=FAULTS, openapi_extra=body, summary="Several questions in one request")
    async def batch(request: Request) -> Any:
        """A question that cannot be answered gets an error in its place. All are asked of the model that the first one names."""
        given: Batch = parsed(Batch, await _json(request))
        if len(given.questions) > limits.questions:
            raise Refused(413, f"{len(given.questions)} questions, the limit is {limits.questions}", "send several batches")
        asked: list[Asked | Refused] = []
        for ask in given.questions:
            try:
                asked.append(_asked(ask, check(ask, limits)))
            except Refused as refused:
                asked.append(refused)
        found = iter(await replies(given.questions[0].model, [one for one in asked if isinstance(one, Asked)]))
        said = [one if isinstance(one, Refused) else next(found) for one in asked]
        return {"replies": [one.body() if isinstance(one, Refused) else one for one in said]}

    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": Why.model_json_schema()}}}}

    @app.post("/v1/explain", response_model=Looks, responses=FAULTS, openapi_extra=body, summary="Where the words look in an image")
    async def explain(request: Request) -> Any:
        why: Why = parsed(Why, await _json(request))
        limits.check_text(why.text)
        return await backend.explain(_model(backend, why.model), why.text, why.key)

    @app.get("/v1/images/{key:path}", responses={**FAULTS, 200: {"content": {"image/jpeg": {}}}}, summary="A photo of the index")
    async def image(key: str, model: str | None = None, large: bool = False) -> Response:
        """320 pixels on the longer side; with `large` up to 1600. A key is looked up in the index, never on a disk."""
        data = await backend.photo(_model(backend, model), key, large)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})


def _telling(app: FastAPI, backend: Backend, figures: Figures) -> None:
    """The routes that say how the service is."""

    @app.get("/v1/models", response_model=Models, responses=FAULTS, summary="The served models, their versions and filters")
    async def models() -> Any:
        return {"models": [await backend.said(name) for name in backend.names]}

    @app.get("/healthz", summary="Whether the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", responses={503: {"model": Fault}}, summary="Whether questions can be answered")
    async def readyz() -> dict[str, str]:
        if problem := await backend.ready():
            raise Refused(503, problem, "wait until the replicas have started", 5)
        return {"status": "ready"}

    @app.get("/metrics", summary="Figures for Prometheus")
    async def metrics() -> Response:
        if not await backend.ready():
            for name in backend.names:
                said = await backend.said(name)
                figures.images.labels(name, said.version).set(said.images)
                figures.refused.labels(name).set(said.problem is not None)
        return Response(figures.text(), media_type="text/plain; version=0.0.4")


def _page(app: FastAPI) -> None:
    """The files of the page, read once."""
    folder = resources("pipelines.serving").joinpath("page")
    for path, name in {"/": "page.html", "/v1/docs": "docs.html"}.items():
        _static(app, path, folder.joinpath(name).read_bytes(), KINDS["html"])
    for name in ("page.css", "page.js", "docs.js", "icon.svg"):
        _static(app, f"/{name}", folder.joinpath(name).read_bytes(), KINDS[name.rpartition(".")[2]])


def _static(app: FastAPI, path: str, data: bytes, kind: str) -> None:
    async def file() -> Response:
        return Response(data, media_type=kind, headers={"Cache-Control": "no-cache"})

    app.add_api_route(path, file, include_in_schema=False)


def _faults(app: FastAPI) -> None:
    """Every refusal in one form."""

    @app.exception_handler(Refused)
    async def refused(request: Request, fault: Refused) -> JSONResponse:
        return JSONResponse(fault.body(), fault.status, fault.headers())

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, fault: RequestValidationError) -> JSONResponse:
        first = fault.errors()[0]
        where = ".".join(str(part)[:64] for part in first["loc"])
        return JSONResponse({"error": f"{where}: {first['msg'][:200]}", "remedy": "see /v1/docs"}, 422)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, fault: Exception) -> JSONResponse:
        """The guard, to which it is raised on, logs and counts it."""
        return JSONResponse(FAILED.body(), FAILED.status, FAILED.headers())

    @app.exception_handler(HTTPException)
    async def other(request: Request, fault: HTTPException) -> JSONResponse:
        if fault.status_code in (404, 405):  # a wrong method is an address that is not there
            return JSONResponse({"error": "no such address or method", "remedy": "/v1/docs lists them"}, 404)
        return JSONResponse({"error": str(fault.detail)[:200], "remedy": "see /v1/docs"}, 400)


async def _ask(request: Request, limits: Limits) -> tuple[Ask, bytes | None]:
    """The question of a request, and its image."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        ask: Ask = parsed(Ask, await request.body())
        return ask, check(ask, limits)
    if kind not in IMAGE_TYPES:
        raise Refused(415, f"a body of type {kind[:64] or 'unknown'!r}", "send application/json, or the bytes of an image as image/jpeg")
    image = await request.body()
    limits.check_image(image)
    return _of_query(request, limits), image


def _of_query(request: Request, limits: Limits) -> Ask:
    """Beside an image as body: the fields of the query, and what is none of them as filter."""
    said: dict[str, Any] = {"where": {}}
    for name, value in request.query_params.multi_items():
        if name in ("text", "find", "model", "version"):
            said[name] = value
        elif name in ("k", "offset", "min_score"):
            said[name] = _number(name, value)
        else:
            said["where"].setdefault(name, []).append(value)
    ask: Ask = parsed(Ask, json.dumps(said).encode())
    check(ask.model_copy(update={"like": "-"}), limits)  # everything but the image, which is there
    return ask


def _number(name: str, value: str) -> float | int:
    try:
        return float(value) if name == "min_score" else int(value)
    except ValueError:
        raise Refused(422, f"{name} is no number: {value[:32]!r}", "write it in digits") from None


async def _json(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"a body of type {kind[:64] or 'unknown'!r}", "send application/json")
    return await request.body()


def _asked(ask: Ask, image: bytes | None) -> Asked:
    by_text = ask.text is not None
    question = Question(
        text=ask.text,
        image=image,
        find=ask.find or ("images" if by_text or ask.like is not None else "captions"),
        k=ask.k,
        offset=ask.offset,
        where=ask.where,
        min_score=ask.min_score,
    )
    return Asked(question, ask.like, ask.version)


def _model(backend: Backend, name: str | None) -> str:
    if name is None:
        return backend.names[0]
    if name not in backend.names:
        raise Refused(404, f"no model {name[:64]!r} is served", f"ask for one of {', '.join(backend.names)}")
    return name


def _schema(kind: Any) -> dict[str, Any]:
    """The JSON schema of a body with all that it refers to inside."""
    said = kind.model_json_schema()
    inner = said.pop("$defs", {})
    for field in said["properties"].values():
        if "$ref" in field.get("items", {}):
            field["items"] = inner[field["items"]["$ref"].rpartition("/")[2]]
    return dict(said)
