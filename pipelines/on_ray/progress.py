"""How far a training on Ray is: rank 0 writes it to a board, the driver reads it. A module of its own, whose actor needs no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Board:
    """Where rank 0 says how far it is."""

    def __init__(self) -> None:
        self.said: list[tuple[int, str, dict[str, float] | None]] = []

    def put(self, done: int, words: str, values: dict[str, float] | None = None) -> None:
        self.said.append((done, words, values))

    def take(self) -> list[tuple[int, str, dict[str, float] | None]]:
        """What was said since the last call."""
        said, self.said = self.said, []
        return said


@contextmanager
def watched(board: Any, show: Callable[[int, str, dict[str, float] | None], None]) -> Iterator[None]:
    """Reads the board twice a second while the driver waits for the workers."""
    import ray

    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for said in ray.get(board.take.remote()):
                show(*said)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
        over.set()
        thread.join(timeout=5)
        for said in ray.get(board.take.remote()):
            show(*said)
    finally:
        over.set()
        thread.join(timeout=5)
