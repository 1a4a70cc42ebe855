"""Stores that go away for a while: what is asked of them is asked again, for two minutes, and counted.

The one place of retries. An error that passes (no connection, a timeout, a 5xx answer, half a body) is followed by a pause and another
attempt; one that stays (no such bucket, no permission, expired credentials, a full disk) is raised at once.
"""

from __future__ import annotations

import errno
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

VARIABLE = "ITM_PATIENCE"
"""The environment variable of the seconds for which a store that has answered before is asked again."""
SECONDS = 120.0
FIRST = 2.0
"""Seconds for which a stage asks what has not answered it yet: with the last attempt, a dead address is refused within ten."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 8.0  # seconds; a pause is drawn between 0 and a bound that doubles (full jitter)
SILENT = 5.0  # seconds of waiting that nothing is said of
_FINAL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL}
_REMEDIES = (  # of what a store says when it refuses
    (
        re.compile(r"Expired_?Token|token.{0,20}expired|Request_?Expired|Token_?Refresh_?Required", re.IGNORECASE),
        "the credentials of the store have expired: renew them and run the stage again, it resumes",
    ),
    (
        re.compile(r"Status\(UNAUTHENTICATED"),
        "the store does not know these credentials: mend GOOGLE_APPLICATION_CREDENTIALS, of this machine and of all nodes",
    ),
    (
        re.compile(r"Status\(PERMISSION_DENIED"),
        "the credentials may not do this: have the right to read, list and write there granted (GOOGLE_APPLICATION_CREDENTIALS)",
    ),
    (
        re.compile(r"No_?Such_?Bucket|specified bucket does not exist", re.IGNORECASE),
        "there is no such bucket: mend the name, or AWS_ENDPOINT_URL, or make the bucket",
    ),
    (
        re.compile(r"Invalid_?Access_?Key|Signature_?Does_?Not_?Match|Invalid_?Token|HTTP status 401", re.IGNORECASE),
        "the store does not know these credentials: mend AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of this machine and of all nodes",
    ),
    (
        re.compile(r"Access_?Denied|HTTP status 403", re.IGNORECASE),
        "the credentials may not do this: have the right to read, list and write there granted, or use others (AWS_ACCESS_KEY_ID)",
    ),
    (
        re.compile(r"HTTP status 400\) during HeadObject", re.IGNORECASE),  # an answer without a body: it does not say why
        "the store refuses the request: expired credentials (AWS_SESSION_TOKEN) or another AWS_REGION than the bucket's",
    ),
)
_CERTIFICATE = re.compile(r"Quota_?Exceeded|(curlCode: |CURL error \[)(51|58|60|77)\b", re.IGNORECASE)
_PASSING = re.compile(
    r"NETWORK_CONNECTION|Slow_?Down|Service_?Unavailable|Internal_?(Failure|Error)|Throttl|Failed to flush|curlCode"
    r"|HTTP (status|error)( code)?:? ?(5\d\d|408|429)|Request_?Time_?out|timed out|reset by peer|connection (refused|closed|aborted)"
    r"|broken pipe|IncompleteRead|disconnected|could( not|n't) (connect|resolve)|cannot connect"
    r"|google::cloud::Status\((UNAVAILABLE|INTERNAL|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|DATA_LOSS|ABORTED)|CURL error",
    re.IGNORECASE,
)


class StoreGone(OSError):
    """A store did not answer for longer than it is waited for; the message says how long, and that the stage can be run again.

    last: the error of the last attempt.
    """

    last: Exception | None = None


class Refused(OSError):
    """A store refuses: no such bucket, unknown or expired credentials, no permission; the message has the remedy."""


@dataclass
class Asked:
    """Requests of this process that had to be made again, and the seconds that passed before they were answered."""

    again: int = 0
    waited: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def since(self, before: tuple[int, float]) -> str:
        """One line of what came after the moment that had (again, waited); '' where nothing did."""
        return str(Asked(self.again - before[0], self.waited - before[1]))

    def __str__(self) -> str:
        return f"the store was asked again {self.again:,} times, {self.waited:.1f} s waited" if self.again else ""

    def add(self, waited: float, again: int = 1) -> None:
        """Also what another process of the same work tells."""
        with self.lock:
            self.again, self.waited = self.again + again, self.waited + waited


ASKED = Asked()
_met: set[str] = set()  # stores that have answered this process
_gone: set[str] = set()  # stores that were given up; what is asked of them next is asked once, until one answers
_first: float | None = None  # seconds for the first answer of a store, None = as for any other


@contextmanager
def first_contact(seconds: float | None = None) -> Iterator[None]:
    """Inside, a store that has not answered this process is asked for `seconds` (unset: 2): for the driver of a stage.

    A worker, which takes up work in the middle of it, is as patient with its first request as with any other. Raises ValueError for a
    number of seconds that is none.
    """
    global _first
    if seconds is not None and not 0 <= seconds < float("inf"):
        raise ValueError(f"--wait-for {seconds:g}: say for how many seconds a store or server is waited for that does not answer yet")
    before, _first = _first, FIRST if seconds is None else seconds
    _met.clear()
    _gone.clear()
    try:
        yield
    finally:
        _first = before


def first_limit() -> float:
    """Seconds for which a server that has not answered yet is asked again: none outside of a stage."""
    return _first or 0.0


def limit(store: str) -> float:
    """Seconds for which `store` is asked again."""
    if store in _gone:
        return 0.0
    return _first if _first is not None and store not in _met else budget()


def budget() -> float:
    """Seconds for which a request is made again: ITM_PATIENCE, else 120. Raises ValueError for what is no number of seconds."""
    said = os.environ.get(VARIABLE, "")
    try:
        seconds = float(said or SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{VARIABLE}={said} is no number of seconds: say e.g. {VARIABLE}=120")
    return seconds


def passes(error: Exception) -> bool:
    """Whether the request that failed with `error` may succeed when it is made again."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    named = f"{type(error).__name__}: {error}"
    final = isinstance(error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError | NotADirectoryError)
    if final or getattr(error, "errno", None) in _FINAL_NUMBERS or _CERTIFICATE.search(named) or _remedy(error):
        return False
    return _PASSING.search(named) is not None


def _remedy(error: Exception) -> str | None:
    """What can be done about a store that refuses; None where it does not."""
    return next((remedy for pattern, remedy in _REMEDIES if pattern.search(str(error))), None) if isinstance(error, OSError) else None


def asked(ask: Callable[[], T], uri: str, store: str) -> T:
    """What `ask` returns, asked again while its errors pass. It must be safe to ask twice.

    uri: what it is about, for messages; store: what answers or is gone as a whole. Raises StoreGone after `budget` seconds, Refused where
    the store says why it will not, and what else `ask` raises when that does not pass.
    """
    begun, bound, attempts, told = time.monotonic(), FIRST_PAUSE, 0, False
    while True:
        attempts += 1
        since = time.monotonic()
        try:
            found = ask()
        except Exception as error:
            if not passes(error):
                if (remedy := _remedy(error)) is not None:
                    raise Refused(f"{uri}: {remedy} ({_short(error)})") from None
                raise
            tried = time.monotonic() - begun
            if tried >= limit(store):
                gone = StoreGone(_given_up(uri, tried, attempts, error, store in _met or _first is None))
                gone.last = error
                _gone.add(store)
                raise gone from None
            if tried >= SILENT and not told:
                told = True
                print(f"{uri}: no answer for {tried:.0f} s ({_short(error)}); asking for {limit(store):.0f} s", file=sys.stderr, flush=True)
            time.sleep(random.uniform(0, bound))
            bound = min(2 * bound, LONGEST_PAUSE)
            ASKED.add(time.monotonic() - since)
        else:
            _gone.discard(store)
            _met.add(store)
            return found


def _given_up(uri: str, tried: float, attempts: int, error: Exception, known: bool) -> str:
    times = "once" if attempts == 1 else f"{attempts} times in {tried:.0f} s"
    begun = (
        f"what was finished is kept: run the stage again when the store is back, it resumes ({VARIABLE}=600 would wait ten minutes)"
        if known
        else "nothing was begun: mend the address (AWS_ENDPOINT_URL) or start the store; --wait-for 120 would wait two minutes for it"
    )
    return f"{uri}: the store did not answer, asked {times} ({_short(error)}); {begun}"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^When [^:]+: ", "", re.sub(r"\. Detail: .*", "", text))
    return text if len(text) <= 200 else text[:200] + " ..."
