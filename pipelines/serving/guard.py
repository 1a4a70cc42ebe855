"""What stands around the API, as plain ASGI: who may ask, how much and how often, in what time; headers, figures, and no bare failure."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.serving.figures import Figures
from pipelines.serving.limits import PHOTOS, Buckets, Limits
from pipelines.serving.refusals import Refused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN, SHORTEST = "ITM_TOKEN", 16
log = logging.getLogger("itm.serve")
ALWAYS_OPEN = ("/healthz", "/readyz")
ASSETS = ("/", "/page.css", "/page.js", "/docs.js", "/icon.svg", "/v1/docs", "/v1/openapi.json")
"""Files that hold no data: with a token switched on they stay open, or no browser could ask for the token."""
FAILED = Refused(503, "the service could not do this", "ask its operator: the log says more", 60.0)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True)
class Access:
    """token: what a client must show, None = nobody is asked; log_queries: requests are logged with their body."""

    token: str | None = None
    log_queries: bool = False

    @classmethod
    def read(cls, auth: bool, token_file: str | None = None, log_queries: bool = False) -> Access:
        """The token of `token_file`, else of the variable ITM_TOKEN. Raises ValueError where `auth` asks for one and there is none, or a
        short one: it could be guessed."""
        if not auth:
            return cls(None, log_queries)
        token = Path(token_file).read_text().strip() if token_file else os.environ.get(TOKEN, "").strip()
        if len(token) < SHORTEST:
            where = f"the file {token_file}" if token_file else f"the variable {TOKEN}"
            raise ValueError(f"{where} holds no token of at least {SHORTEST} characters: openssl rand -hex 24 makes one")
        return cls(token, log_queries)


class Guard:
    """Around `app`. No header of CORS is ever sent, so that pages of other hosts cannot read what is answered."""

    def __init__(self, app: App, limits: Limits, access: Access, figures: Figures) -> None:
        self.app, self.limits, self.access, self.figures = app, limits, access, figures
        self.questions, self.files, self.busy = Buckets(limits), Buckets(limits, PHOTOS), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets
        started, reply = time.perf_counter(), Reply(send)
        waits = scope["path"] not in ALWAYS_OPEN
        self.busy += waits
        try:
            self._admit(scope)
            body = await asyncio.wait_for(self._body(scope, receive), self.limits.seconds)
            if self.access.log_queries and body:
                log.warning("%s %s %s", _client(scope), scope["path"], body[:2000].decode(errors="replace"))
            await asyncio.wait_for(self.app(scope, _once(body, receive), reply), self.limits.seconds)
        except Refused as refused:
            await reply.refuse(refused)
        except TimeoutError:
            gone = Refused(503, f"no answer within {self.limits.seconds:g} s", "ask again later, or for less", self.limits.seconds)
            await reply.refuse(gone)
        except Exception as error:
            self.figures.unexpected.inc()
            log.error("unexpected error at %s", _route(scope), exc_info=error)
            await reply.refuse(FAILED)
        finally:
            self.busy -= waits
            self.figures.seen(_route(scope), reply.status, time.perf_counter() - started)

    def _admit(self, scope: Scope) -> None:
        if scope["path"] in ALWAYS_OPEN:
            return
        self.figures.busy.set(self.busy)
        light = scope["path"] in ASSETS or scope["path"].startswith("/v1/images/")
        if wait := (self.files if light else self.questions).take(_client(scope)):
            raise Refused(429, f"more than {self.limits.rate:g} requests a second", "wait as Retry-After says", wait)
        if self.access.token is not None and scope["path"] not in ASSETS:
            said = _header(scope, b"authorization")
            if not hmac.compare_digest(said, b"Bearer " + self.access.token.encode()):
                remedy = "send the header Authorization: Bearer <token>; the operator of the service has the token"
                raise Refused(401, "no token" if not said else "a wrong token", remedy)
        if self.busy > self.limits.waiting:
            raise Refused(503, f"{self.limits.waiting} requests are waiting", "ask again in a second", 1.0)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        said = _header(scope, b"content-length")
        too_large = Refused(413, f"the body has more than {self.limits.body_bytes:,} bytes", "send a smaller image, or fewer questions")
        if said.isdigit() and int(said) > self.limits.body_bytes:
            raise too_large
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return b""
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.limits.body_bytes:
                raise too_large
            if not message.get("more_body"):
                return b"".join(pieces)


class Reply:
    """`send` that adds the headers of every answer and knows how far it got."""

    def __init__(self, send: Send) -> None:
        self.send, self.status, self.begun = send, 0, False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.status = True, message["status"]
            have = {name.lower() for name, _ in message.get("headers", ())}
            more = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.lower().encode() not in have]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await self.send(message)

    async def refuse(self, refused: Refused) -> None:
        if self.begun:  # the rest of an answer cannot be taken back
            return
        body = json.dumps(refused.body()).encode()
        plain = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        if refused.status == 413:
            plain["Connection"] = "close"  # or the server reads the rest of the body
        headers = [(name.encode(), value.encode()) for name, value in (plain | refused.headers()).items()]
        await self({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def _once(body: bytes, receive: Receive) -> Receive:
    """`receive` of a body that was read already; afterwards what the server says: that the client has gone."""
    given = False

    async def read() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")


def _client(scope: Scope) -> str:
    """By whom requests are counted. What a client says about itself (X-Forwarded-For) is not believed."""
    return str((scope.get("client") or ("unknown",))[0])


def _route(scope: Scope) -> str:
    """The path as the figures count it: of what a client can make up, only the beginning."""
    path = str(scope["path"])
    if path in (*ALWAYS_OPEN, *ASSETS, "/metrics", "/v1/search", "/v1/batch", "/v1/explain", "/v1/models"):
        return path
    return "/v1/images" if path.startswith("/v1/images/") else "other"
