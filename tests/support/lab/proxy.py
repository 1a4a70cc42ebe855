"""What stands before a service and can be made to fail as networks and busy stores do. The service itself loses nothing by it."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from tests.support.lab.machines import Machine, listen

Fault = Literal["none", "cut", "slow", "busy", "reset", "half"]
BUSY = b"<Error><Code>SlowDown</Code><Message>try again</Message></Error>"
ANSWER = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(BUSY), BUSY)


class Proxy:
    """Passes on what comes to the switch's `port` to 127.0.0.1:`upstream` of this machine.

    fault: none; cut (connections are refused, open ones end); slow (each request waits `latency` seconds); busy (503 SlowDown); reset
    (the connection is reset when a request has come); half (an answer breaks off half-way). The last three befall each `every`-th request.
    """

    def __init__(self, switch: Machine, port: int, upstream: int) -> None:
        self.switch, self.port, self.upstream = switch, port, upstream
        self.fault: Fault = "none"
        self.latency, self.every, self.requests = 10.0, 1, 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._listener: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(self._listen())

    def set(self, fault: Fault, every: int = 1) -> None:
        self.every, before, self.fault = every, self.fault, fault
        if fault == "cut":
            self._do(self._unlisten())
        elif before == "cut":
            self._do(self._listen())

    @contextmanager
    def failing(self, fault: Fault, every: int = 1) -> Iterator[None]:
        self.set(fault, every)
        try:
            yield
        finally:
            self.set("none")

    def close(self) -> None:
        if self._listener:
            self._do(self._unlisten())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _do(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)  # type: ignore[arg-type]

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._talk, sock=listen(self.switch, self.port))

    async def _unlisten(self) -> None:
        assert self._listener is not None
        self._listener.close()
        self._listener = None
        for writer in self._open:
            writer.transport.abort()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back_reader, back = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back}
        try:
            with suppress(OSError):
                await asyncio.gather(self._requests(reader, writer, back), self._answers(back_reader, writer))
        finally:
            for one in (writer, back):
                self._open.discard(one)
                one.transport.abort() if self.fault == "reset" else one.close()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            begins = re.match(rb"[A-Z]+ \S+ HTTP/1", data) is not None
            self.requests += begins
            if begins and self.fault == "slow":
                await asyncio.sleep(self.latency)
            if begins and self._befalls():
                if self.fault == "busy":
                    await _rest(reader, data)
                    writer.write(ANSWER)
                    await writer.drain()
                    writer.close()
                else:
                    writer.transport.abort()
                break
            back.write(data)
            await back.drain()
        back.close()

    def _befalls(self) -> bool:
        return self.fault in ("busy", "reset") and self.requests % self.every == 0

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if self.fault == "half" and self.requests % self.every == 0 and len(data) > 1:
                writer.write(data[: len(data) // 2])
                await writer.drain()
                writer.close()
                return
            writer.write(data)
            await writer.drain()
        writer.close()


async def _rest(reader: asyncio.StreamReader, data: bytes) -> None:
    """Read the body of a request whose head is in `data`, unless its client waits for leave to send it."""
    head, _, body = data.partition(b"\r\n\r\n")
    if b"100-continue" in head.lower():
        return
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    left = int(length[1]) - len(body) if length else 0
    while left > 0 and (more := await reader.read(1 << 16)):
        left -= len(more)
