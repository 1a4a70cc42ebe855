"""A sequence whose next item is made while the last one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items in their order, each made by one thread while the reader is busy with the one before. What making one raises is raised in
    its place."""
    rest, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(next, rest, end)
        while (item := made.result()) is not end:
            made = pool.submit(next, rest, end)
            yield item  # type: ignore[misc]  # not `end`
