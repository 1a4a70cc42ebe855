"""Stores that go away for a while: what is asked of them is asked again, for two minutes, and counted.

The one place of retries. An error that passes (no connection, a timeout, a 5xx answer, half a body) is followed by a pause and another
attempt; one that stays (no such bucket, no permission, expired credentials, a full disk) is raised at once.
"""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

VARIABLE = "ITM_PATIENCE"
"""The environment variable of the seconds for which a store that has answered before is asked again."""
SECONDS = 120.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 8.0  # seconds; a pause is drawn between 0 and a bound that doubles (full jitter)
_FINAL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL}
_EXPIRED = re.compile(r"Expired_?Token|token.{0,20}expired|Request_?Expired|Token_?Refresh_?Required", re.IGNORECASE)
_FINAL = re.compile(
    r"No_?Such_?Bucket|Access_?Denied|Invalid_?Access_?Key|Signature_?Does_?Not_?Match|Invalid_?Token|Quota_?Exceeded"
    r"|curlCode: (51|58|60|77)\b",  # certificates
    re.IGNORECASE,
)
_PASSING = re.compile(
    r"NETWORK_CONNECTION|Slow_?Down|Service_?Unavailable|Internal_?(Failure|Error)|Throttl|Failed to flush|curlCode"
    r"|HTTP (status|error)( code)?:? ?(5\d\d|408|429)|Request_?Time_?out|timed out|reset by peer|connection (refused|closed|aborted)"
    r"|broken pipe|IncompleteRead|disconnected|could ?n.t (connect|resolve)|cannot connect",
    re.IGNORECASE,
)


class StoreGone(OSError):
    """A store did not answer for longer than it is waited for; the message says how long, and that the stage can be run again."""


class Expired(OSError):
    """The credentials of a store are not valid any more."""


@dataclass
class Asked:
    """Requests of this process that had to be made again, and the seconds that passed before they were answered."""

    again: int = 0
    waited: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, waited: float) -> None:
        with self.lock:
            self.again, self.waited = self.again + 1, self.waited + waited


ASKED = Asked()
_gone: set[str] = set()  # stores that were given up; what is asked of them next is asked once, until one answers


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
    if final or getattr(error, "errno", None) in _FINAL_NUMBERS or _EXPIRED.search(named) or _FINAL.search(named):
        return False
    return _PASSING.search(named) is not None


def asked(ask: Callable[[], T], uri: str, store: str) -> T:
    """What `ask` returns, asked again while its errors pass. It must be safe to ask twice.

    uri: what it is about, for messages; store: what answers or is gone as a whole. Raises StoreGone after `budget` seconds, Expired for
    credentials that are not valid any more, and what `ask` raises when that does not pass.
    """
    begun, bound, attempts = time.monotonic(), FIRST_PAUSE, 0
    while True:
        attempts += 1
        since = time.monotonic()
        try:
            found = ask()
        except Exception as error:
            if _EXPIRED.search(str(error)):
                raise Expired(
                    f"{uri}: the credentials of the store have expired ({_short(error)}): renew them and run the stage again, it resumes"
                ) from None
            if not passes(error):
                raise
            tried = time.monotonic() - begun
            if tried >= (0.0 if store in _gone else budget()):
                _gone.add(store)
                raise StoreGone(_given_up(uri, tried, attempts, error)) from None
            time.sleep(random.uniform(0, bound))
            bound = min(2 * bound, LONGEST_PAUSE)
            ASKED.add(time.monotonic() - since)
        else:
            _gone.discard(store)
            return found


def _given_up(uri: str, tried: float, attempts: int, error: Exception) -> str:
    times = "once" if attempts == 1 else f"{attempts} times in {tried:.0f} s"
    return (
        f"{uri}: the store did not answer, asked {times} ({_short(error)}); what was finished is kept: run the stage again when the store "
        f"is back, it resumes ({VARIABLE}=600 would wait ten minutes)"
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^When [^:]+: ", "", re.sub(r"\. Detail: .*", "", text))
    return text if len(text) <= 200 else text[:200] + " ..."
