"""Who is at work on an output: a second driver that is started on it by mistake is refused, and `itm plan` says that the first one runs.

A lease is a small file in the folder, with a heartbeat: its writer renews it twice a minute. It is nobody's any more when its process is
gone (seen from the same machine) or has not renewed it for five minutes by the clock of the store. On a local disk one process makes it
(O_EXCL), on S3 with boto3 as well (If-None-Match); in another store two drivers that start within the same second may both get it.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from itm.data import files
from itm.data.conditional import put_if
from itm.data.files import join

NAME = "driver.tmp-lease"
"""Listings leave it out, as they do what is half written."""
BEAT, STALE = 30.0, 300.0
"""Seconds between heartbeats, and after which a silent driver of another machine is taken for dead: longer than a store is waited for."""


class Held(ValueError):
    """Another driver is at work there; the message names it."""


@dataclass(frozen=True)
class Lease:
    """A driver: `started` tells its process from another one that got its number later; `since` in seconds of its own clock."""

    stage: str
    host: str
    pid: int
    started: int
    user: str
    since: float
    token: str

    @classmethod
    def of_this_process(cls, stage: str) -> Lease:
        return cls(stage, _machine(), os.getpid(), _started(os.getpid()), _user(), time.time(), uuid.uuid4().hex)

    def said(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def is_dead(self, silent: float) -> bool:
        """silent: seconds since its last heartbeat."""
        if self.host != _machine():
            return silent > STALE
        return _started(self.pid) != self.started or (self.pid == os.getpid() and self.token not in _ours)

    def who(self, silent: float) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        host = self.host.partition(" ")[0]
        return f"itm {self.stage} of {self.user} on {host} (process {self.pid}) since {since}, last seen {max(0.0, silent):.0f} s ago"


_ours: set[str] = set()  # tokens of the leases that this process holds


@contextmanager
def held(folder: str, stage: str) -> Iterator[None]:
    """For the time of the work of `stage` in a folder. Raises Held, naming who is at work there."""
    lease, uri = Lease.of_this_process(stage), join(folder, NAME)
    new = not files.is_remote(folder) and not os.path.isdir(files.absolute(folder))
    _ours.add(lease.token)
    try:
        _take(folder, lease)
        done = threading.Event()
        beating = threading.Thread(target=_beat, args=(uri, lease, done), daemon=True)
        beating.start()
        try:
            yield
        finally:
            done.set()
            beating.join(BEAT)
            with suppress(OSError, ValueError):
                if (found := _read(uri)) is not None and found[0] == lease:
                    files.delete(uri)
                    if new:
                        os.rmdir(files.absolute(folder))  # unless something was made there
    finally:
        _ours.discard(lease.token)


def holder(folder: str, stage: str | None = None) -> str | None:
    """Who is at work in a folder (at `stage`, if given), as a line; None where nobody is, or only one that is dead."""
    found = _read(join(folder, NAME))
    if found is None:
        return None
    lease, renewed = found
    silent = time.time() - renewed
    return None if lease.is_dead(silent) or stage not in (None, lease.stage) else lease.who(silent)


def was_left(folder: str) -> bool:
    """Whether a driver died in the folder: its lease is still there."""
    return files.exists(join(folder, NAME)) and holder(folder) is None


def _take(folder: str, lease: Lease) -> None:
    uri = join(folder, NAME)
    for _ in range(3):
        if _made(uri, lease, None):
            return
        if (found := _read(uri)) is None:  # it has just been given back
            continue
        other, renewed = found
        if other == lease:  # it was made, and the answer was lost
            return
        silent = (time.time() if other.host == _machine() else files.clock_of(folder)) - renewed
        if not other.is_dead(silent):
            raise Held(
                f"{folder} is in use by {other.who(silent)}: wait for its end, or stop it, or give this one another output; "
                f"if it is dead, delete {uri}"
            )
        if _made(uri, lease, other):
            return
    raise Held(f"{folder}: others take {uri} at the same moment; start again")


def _made(uri: str, lease: Lease, instead: Lease | None) -> bool:
    """Whether the lease is now ours: made where there was none, or in the place of that of a dead driver."""
    if not files.is_remote(uri):
        return _made_here(files.absolute(uri), lease, instead)
    if uri.startswith("s3://") and (made := put_if(uri, lease.said(), instead.said() if instead else None)) is not None:
        return made
    if not _is(uri, instead):
        return False
    files.write_atomic(uri, lease.said())
    return True


def _made_here(path: str, lease: Lease, instead: Lease | None) -> bool:
    os.makedirs(Path(path).parent, exist_ok=True)
    with files.alone(Path(path).parent):  # of those that find a dead one's lease, one takes it
        if instead is not None:
            if not _is(path, instead):
                return False
            with suppress(FileNotFoundError):
                os.remove(path)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(handle, "wb") as stream:
            stream.write(lease.said())
        return True


def _is(uri: str, lease: Lease | None) -> bool:
    found = _read(uri)
    return (found and found[0]) == lease


def _read(uri: str) -> tuple[Lease, float] | None:
    """The lease and when it was renewed by the clock of the store; None without one. One that no driver writes is dead."""
    try:
        renewed = files.modified(uri)
        said = json.loads(files.read_bytes(uri))
        return Lease(**said), renewed
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Lease("?", _machine(), -1, 0, "?", renewed, ""), renewed


def _beat(uri: str, lease: Lease, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):  # a store that is away: the next one will do
            if not files.is_remote(uri):
                os.utime(files.absolute(uri))
            elif _is(uri, lease):
                files.write_atomic(uri, lease.said())


def _machine() -> str:
    """The host, and the numbering of processes on it: a container has its own."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _started(pid: int) -> int:
    """When a process started, in ticks since the start of the machine, 0 where the system does not tell; -1 for one that is gone."""
    if os.path.exists("/proc/self/stat"):
        with suppress(OSError):
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return -1 if state in "ZX" else int(fields[18])
        return -1
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except PermissionError:
        pass
    return 0


def _user() -> str:
    try:
        return re.sub(r"\s", "_", getpass.getuser())
    except (KeyError, OSError):  # a container's number without a name
        return str(os.getuid())
