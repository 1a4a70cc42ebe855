"""Where the tracking store lies: the one place that turns paths into URIs and back, opens a store, and finds out that it is dead.

A path may hold any printable character. SQLAlchemy ends the path of a SQLite URI at `?` and decodes `%`; artifact locations are `file:`
URIs, in which more is quoted. Gluing strings would write beside the project.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from itm.data import files, patience

SQLITE = "sqlite:///"
DEFAULT = "mlflow.db"
SECONDS = 4.0  # that a server has to connect, and then to answer
_STILL_ALIVE = 60.0  # seconds for which an answer counts
_GATEWAY = (502, 503, 504)  # a proxy answers for a server that does not
_answered: dict[str, float] = {}


class DeadTracking(ValueError):
    """The tracking server does not answer; the message holds its address and the remedy."""


def tracking_uri() -> str:
    """The MLflow address as an absolute URI, fit to be handed to a process with another working directory.

    MLFLOW_TRACKING_URI where set (a relative SQLite file or folder is made absolute), else the file mlflow.db of the working directory.
    Raises DeadTracking where it is unset in a job on another machine, whose working directory goes when it ends.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI") and (submitter := os.environ.get("ITM_SUBMITTED_FROM")):
        raise DeadTracking(
            f"MLFLOW_TRACKING_URI is set neither on {submitter}, which submitted this job, nor on {socket.gethostname()}, where it runs: "
            "set it to the address of your tracking server, http://..."
        )
    uri = os.environ.get("MLFLOW_TRACKING_URI") or SQLITE + DEFAULT
    if uri.startswith(SQLITE) and not uri.startswith(f"{SQLITE}file:"):
        path, query = _parts(uri)
        return sqlite_uri(path) + query
    return uri if "://" in uri or uri.startswith("databricks") else files.absolute(uri.removeprefix("file:"))


def sqlite_uri(path: str | Path) -> str:
    """The URI of a SQLite file, for MLflow and any SQLAlchemy program."""
    return SQLITE + files.absolute(str(path)).replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI; None for any other."""
    return Path(_parts(uri)[0]) if uri.startswith(SQLITE) and not uri.startswith(f"{SQLITE}file:") else None


def folder_uri(path: str | Path) -> str:
    """The `file:` URI of a folder, as artifact locations are written."""
    return Path(files.absolute(str(path))).as_uri()


def local_path(location: str) -> Path | None:
    """The folder of an artifact location that lies on this machine (a `file:` URI or a path); None for a remote one."""
    if location.startswith("file:"):
        return Path(unquote(urlsplit(location.replace("?", "%3F").replace("#", "%23")).path))
    return Path(location) if location.startswith("/") else None


def _parts(uri: str) -> tuple[str, str]:
    """(absolute path, query with its `?`) of a SQLite URI, of which a person may have written the path without quoting it."""
    written, mark, query = uri.removeprefix(SQLITE).partition("?")
    if mark and not re.fullmatch(r"(\w+=[^/&]*&?)+", query):  # no query: a `?` of the path
        written, mark, query = written + mark + query, "", ""
    meant, as_it_is = files.absolute(unquote(written)), files.absolute(written)
    quoted = os.path.isdir(os.path.dirname(meant)) or not os.path.isdir(os.path.dirname(as_it_is))
    return meant if quoted else as_it_is, mark + query


@contextlib.contextmanager
def opening(uri: str) -> Iterator[None]:
    """Around the first use of a store in a process.

    Raises DeadTracking for a server that does not answer. The tables of a SQLite file are made by one process at a time, while the others
    wait. The empty folder that MLflow makes where it takes the quoted path for a path is removed again.
    """
    check_alive(uri)
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    twin = Path(uri.removeprefix(SQLITE)).parent
    made = [folder for folder in (twin, *twin.parents) if not folder.exists()]
    with files.alone(path.parent):
        try:
            yield
        finally:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def check_alive(uri: str | None = None) -> None:
    """Raises DeadTracking when the server at `uri` (default `tracking_uri()`) does not answer. Files need no server.

    A server that has answered this process is asked for as long as a store (`itm.data.patience`); another within 10 seconds, or for as
    long as `itm <stage> --wait-for` says.
    """
    uri = uri or tracking_uri()
    if not _served(uri) or _answered.get(uri, -1e9) > _now() - _STILL_ALIVE:
        return
    seconds = patience.budget() if uri in _answered else patience.first_limit()
    begun, pause = _now(), 0.1
    while (error := _silence(uri)) is not None:
        if _now() - begun >= seconds:
            raise DeadTracking(
                f"no answer from the tracking server at {shown(uri)} ({_reason(error)}): "
                + (
                    f"it was asked for {_now() - begun:.0f} s. What was finished is kept: run the stage again when it is back, it resumes"
                    if uri in _answered
                    else "start it, or set MLFLOW_TRACKING_URI to one that runs (--wait-for 120 waits two minutes for it); where it is "
                    f"unset, runs go to the file {DEFAULT} of the working directory"
                )
            )
        time.sleep(pause)
        pause = min(2 * pause, 5.0)
    answered(uri)


def answered(uri: str) -> None:
    """The server at `uri` has answered, this process or the one that started it: it is waited for when it goes away."""
    _answered[uri] = _now()


def is_alive(uri: str) -> bool:
    """Whether it answers now; it is asked once."""
    return not _served(uri) or _silence(uri) is None


def _served(uri: str) -> bool:
    place = urlsplit(uri)
    return not place.scheme.startswith(("sqlite", "databricks", "file")) and bool(place.hostname)


def _silence(uri: str) -> OSError | None:
    """Why the server gives no answer; None when it does."""
    place = urlsplit(uri)
    try:
        if place.scheme in ("http", "https"):
            _ask(re.sub(r"//[^/@]*@", "//", uri).rstrip("/") + "/health")
        else:
            socket.create_connection((place.hostname or "", place.port or _port(place.scheme)), SECONDS).close()
    except OSError as error:
        return error
    return None


def _ask(url: str) -> None:
    """Any answer shows that somebody is there, refusals as well."""
    try:
        urllib.request.urlopen(url, timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code in _GATEWAY:
            raise
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # who trusts which certificate is MLflow's to know
            raise


def _reason(error: OSError) -> str:
    inner = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", None) or error
    return f"nothing within {SECONDS:g} s" if isinstance(inner, TimeoutError) else str(inner)


def _port(scheme: str) -> int:
    return 5432 if scheme.startswith("postgres") else 3306


def _now() -> float:
    return time.monotonic()


def shown(uri: str) -> str:
    """The address without a password."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)
