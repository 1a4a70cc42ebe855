"""How far a piece of work is: a bar where there is a terminal, else lines, which a log of a job or of a batch system can show.

A line says the time of day, the work, how much of it is done, what the caller adds, and the time left at the pace so far.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

EVERY = 10.0  # seconds between two lines
T = TypeVar("T")


class Progress:
    """A context manager around work of `total` units, of which `initial` are done.

    every: seconds between two lines; 0: a line for each call, where the caller has an interval of its own. out: unset, stderr.
    """

    def __init__(self, title: str, total: int, unit: str, initial: int = 0, every: float = EVERY, out: TextIO | None = None) -> None:
        self.title, self.total, self.unit, self.every = title, total, unit, every
        self.out = out or sys.stderr
        self.done, self.said = initial, initial
        self.began: tuple[float, int] | None = (time.monotonic(), initial) if every else None
        self.last = time.monotonic()
        self.bar: Any = None
        if self.out.isatty():
            from tqdm import tqdm

            scaled = total >= 1_000_000
            self.bar = tqdm(
                desc=title,
                total=total,
                initial=initial,
                unit=unit,
                unit_scale=scaled,
                mininterval=1,
                file=self.out,
                disable=initial >= total,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.close()
        elif kind is None and self.said != self.done:
            self._line("")

    def update(self, count: int = 1, words: str = "") -> None:
        """`count` more units are done."""
        self.to(self.done + count, words)

    def to(self, done: int, words: str = "", values: Mapping[str, float] | None = None) -> None:
        """`done` units in all are done; words: what else is to be said, e.g. `loss 0.1234`; values: the same for a log of JSON lines."""
        self.done = done
        if self.bar:
            self.bar.set_postfix_str(words, refresh=False)
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.last >= self.every:
            self._line(words, values)

    def _line(self, words: str, values: Mapping[str, float] | None = None) -> None:
        self.last, self.said = time.monotonic(), self.done
        if isinstance(self.out, JsonLines):
            self.out.say(step=self.done, of=self.total, unit=self.unit, work=self.title, **(values or {}))
            return
        left = "" if words.endswith(" left") else self._left()  # a caller who knows the time left has said it
        parts = [f"{self.done:,} of {self.total:,} {self.unit}s", words, left]
        print(f"{time.strftime('%H:%M:%S')} {self.title}: {', '.join(filter(None, parts))}", file=self.out, flush=True)

    def _left(self) -> str:
        """The time left; '' before there is a pace. Where the caller has intervals the first is no measure: workers start in it."""
        if self.began is None:
            self.began = (self.last, self.done)
        since, before = self.began
        if self.done <= before or self.done >= self.total:
            return ""
        return f"{span((self.last - since) / (self.done - before) * (self.total - self.done))} left"


class JsonLines(io.TextIOBase):
    """A stream of JSON objects, one a line: `time` (ISO 8601, with the zone), `stage`, and `message` for what is printed, or what `say` is
    given."""

    def __init__(self, out: TextIO, stage: str) -> None:
        self.out, self.stage, self._rest = out, stage, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            self.say(message=line)
        return len(text)

    def say(self, **fields: object) -> None:
        said = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "stage": self.stage, **fields}
        self.out.write(json.dumps(said, ensure_ascii=False, default=str) + "\n")
        self.out.flush()

    def flush(self) -> None:
        self.out.flush()

    def finish(self) -> None:
        """What was printed without an end of line."""
        if self._rest.strip():
            self.say(message=self._rest)
        self._rest = ""


@contextmanager
def json_lines(stage: str) -> Iterator[None]:
    """Inside, what this process prints on stdout and stderr is JSON lines."""
    before = sys.stdout, sys.stderr
    streams = JsonLines(before[0], stage), JsonLines(before[1], stage)
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.finish()
        sys.stdout, sys.stderr = before


def over(items: Iterable[T], title: str, total: int, unit: str) -> Iterator[T]:
    """The items, one unit each, and how far they are; silent where there are none."""
    if not total:
        yield from items
        return
    with Progress(title, total, unit) as progress:
        for item in items:
            yield item
            progress.update()


def span(seconds: float) -> str:
    """A time in two units at most: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
