"""An S3 server in a process of its own for tests: `python -m tests.support.s3_server PORT [EVERY]` fails each EVERY-th request.

The failures take turns: 503 SlowDown before anything is done, and an answer that breaks off half-way. A client must retry both.
Some keys are refused, whatever the secret: `unknown`, `reader` (may not write), and `expires-N`, which N requests may be made with.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

BUCKET = "bucket"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>try again</Message></Error>"
KEY = re.compile(r"Credential=([^/]+)/")


class Failing:
    """WSGI: some requests fail, as those of a busy store do."""

    def __init__(self, app: Any, every: int) -> None:
        self.app, self.every, self.count = app, every, itertools.count(1)
        self.uses = Counter[str]()

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if refusal := self._refused(environ):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code = refusal
            body = f"<Error><Code>{code}</Code><Message>refused</Message></Error>".encode()
            start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        number = next(self.count)
        if self.every and number % self.every == 0:
            if number // self.every % 2 or environ["REQUEST_METHOD"] != "GET":
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))])
                return [SLOW_DOWN]
            return self._half(b"".join(self.app(environ, start)))
        return self.app(environ, start)  # type: ignore[no-any-return]

    def _refused(self, environ: dict[str, Any]) -> tuple[str, str] | None:
        """(status, code) of the answer to a request with a key that may not make it."""
        found = KEY.search(environ.get("HTTP_AUTHORIZATION", ""))
        key = found[1] if found else ""
        if key == "unknown":
            return "403 Forbidden", "InvalidAccessKeyId"
        if key == "reader" and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return "403 Forbidden", "AccessDenied"
        self.uses[key] += 1
        if key.startswith("expires-") and self.uses[key] > int(key.removeprefix("expires-")):
            return "400 Bad Request", "ExpiredToken"
        return None

    def _half(self, body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        raise ConnectionError("the answer breaks off")


def serve(port: int, every: int) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    app = Failing(DomainDispatcherApplication(create_backend_app), every)
    run_simple("127.0.0.1", port, app, threaded=True)


@contextlib.contextmanager
def s3_server(every: int = 0) -> Iterator[str]:
    """A server with one empty bucket; its endpoint, also set in the environment of this process until the end."""
    from pyarrow import fs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.support.s3_server", str(port), str(every)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert server.poll() is None, "the server did not start"
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            known = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
            for name, value in known.items():
                patch.setenv(name, value)
            endpoint = f"http://127.0.0.1:{port}"
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            fs.S3FileSystem(endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True).create_dir(BUCKET)
            yield endpoint
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    serve(int(sys.argv[1]), int(sys.argv[2]))
