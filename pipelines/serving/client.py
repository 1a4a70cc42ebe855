"""A client of `itm serve`, of the standard library alone: this file can be copied into any program.

service = Client("http://127.0.0.1:8000", token=os.environ.get("ITM_TOKEN"))
for answer in service.search(text="a red circle", k=3)["answers"]:
    print(answer["score"], answer["key"], answer["captions"])
service.search(image="photo.jpg", find="captions")           # a file of this machine: its bytes are sent
service.search(text="two dogs", where={"split": ["test"]}, min_score=0.5)
service.batch([{"text": "a dog"}, {"text": "a cat"}])
service.explain("a red circle", "scene-test-000007")
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote


class ServiceRefused(ValueError):
    """What the service said: status, error and remedy."""

    def __init__(self, status: int, error: str, remedy: str) -> None:
        super().__init__(f"{error} ({status}); {remedy}")
        self.status, self.error, self.remedy = status, error, remedy


class Client:
    """address: http://host:port; token: of a service with --auth; tries: of a request that is refused for a moment (429, 503)."""

    def __init__(self, address: str, token: str | None = None, timeout: float = 60.0, tries: int = 4) -> None:
        self.address, self.token, self.timeout, self.tries = address.rstrip("/"), token, timeout, tries

    def search(self, text: str | None = None, image: str | Path | bytes | None = None, **more: Any) -> dict[str, Any]:
        """The answers of /v1/search. image: a file of this machine, or its bytes; more: like, find, k, offset, where, min_score, model.

        Raises ServiceRefused, and OSError where the service does not answer.
        """
        return dict(self._json("/v1/search", _question(text, image, more)))

    def pages(self, text: str | None = None, image: str | Path | bytes | None = None, **more: Any) -> Iterator[dict[str, Any]]:
        """Every answer, page by page of k. Raises ServiceRefused (409) where another version is served in the middle."""
        asked = _question(text, image, more)
        offset, version = int(asked.pop("offset", 0)), asked.pop("version", None)
        while True:
            found = self._json("/v1/search", asked | {"offset": offset} | ({"version": version} if version else {}))
            yield from found["answers"]
            offset, version = offset + len(found["answers"]), found["version"]
            if not found["answers"] or offset >= found["total"]:
                return

    def batch(self, questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A reply for each question: answers, or error and remedy."""
        asked = [_question(q.get("text"), q.get("image"), {n: v for n, v in q.items() if n not in ("text", "image")}) for q in questions]
        return list(self._json("/v1/batch", {"questions": asked})["replies"])

    def explain(self, text: str, key: str, model: str | None = None) -> dict[str, Any]:
        """words, weights (T,R), boxes (R,4) in pixels, width, height."""
        return dict(self._json("/v1/explain", {"text": text, "key": key} | ({"model": model} if model else {})))

    def photo(self, key: str, large: bool = False, model: str | None = None) -> bytes:
        """A JPEG."""
        query = f"?large={str(large).lower()}" + (f"&model={quote(model, safe='')}" if model else "")
        return self._call(f"/v1/images/{quote(key, safe='')}{query}", None)

    def models(self) -> list[dict[str, Any]]:
        """The served models with their versions, sizes and filters."""
        return list(self._json("/v1/models", None)["models"])

    def _json(self, path: str, body: Mapping[str, Any] | None) -> Any:
        return json.loads(self._call(path, body))

    def _call(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        data = None if body is None else json.dumps(body).encode()
        left = self.tries
        while True:
            left -= 1
            request = urllib.request.Request(self.address + path, data, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return bytes(reply.read())
            except urllib.error.HTTPError as error:
                if left <= 0 or error.code not in (429, 503):
                    raise _refused(error) from None
                time.sleep(min(5.0, float(error.headers.get("Retry-After") or 1)))


def _question(text: str | None, image: str | Path | bytes | None, more: Mapping[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {name: value for name, value in more.items() if value is not None}
    if text is not None:
        asked["text"] = text
    if image is not None:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        asked["image"] = base64.b64encode(data).decode()
    return asked


def _refused(error: urllib.error.HTTPError) -> ServiceRefused:
    try:
        said = json.loads(error.read())
        return ServiceRefused(error.code, str(said["error"]), str(said["remedy"]))
    except (ValueError, KeyError, TypeError):
        return ServiceRefused(error.code, error.reason, "ask later; no service of itm answered")
