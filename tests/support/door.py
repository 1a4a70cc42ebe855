"""A server as its clients see it, behind a door that a test can shut: connections break off, and new ones are refused."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator


class Door:
    """Listens on a port of its own and passes on what comes to `port`, while it is open.

    maimed: so many answers to come end after their first line.
    """

    def __init__(self, port: int) -> None:
        self.behind = port
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.passing: list[socket.socket] = []
        self.maimed = 0
        self._serve()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def shut(self) -> None:
        # A thread in `accept` holds the port until it wakes up: so it is woken.
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for one in self.passing:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.passing = []

    def open(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", self.port))
        self._serve()

    def shut_for(self, seconds: float) -> None:
        """Shut now, and open again after so many seconds, while the caller goes on."""
        self.shut()
        threading.Thread(target=lambda: (time.sleep(seconds), self.open()), daemon=True).start()

    def _serve(self) -> None:
        threading.Thread(target=self._accept, args=(self.listening,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                outer, _ = listening.accept()
            except OSError:
                return
            try:
                inner = socket.create_connection(("127.0.0.1", self.behind))
            except OSError:
                outer.close()
                continue
            self.passing += [outer, inner]
            for one, other, change in ((outer, inner, None), (inner, outer, self._maim)):
                threading.Thread(target=_pass_on, args=(one, other, change), daemon=True).start()

    def _maim(self, data: bytes) -> bytes:
        if not self.maimed:
            return data
        self.maimed -= 1
        return data[: data.index(b"\r\n") + 2]


def _pass_on(one: socket.socket, other: socket.socket, change: Callable[[bytes], bytes] | None) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(1 << 16):
            passed = change(data) if change else data
            other.sendall(passed)
            if passed != data:
                break
    for end in (one, other):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def door_to(address: str) -> Iterator[Door]:
    """A door to a server at `http://127.0.0.1:<port>`."""
    door = Door(int(address.rpartition(":")[2]))
    try:
        yield door
    finally:
        with contextlib.suppress(OSError):
            door.shut()
