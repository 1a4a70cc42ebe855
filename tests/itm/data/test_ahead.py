from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from itm.data.ahead import ahead


def test_the_next_item_is_made_while_the_last_one_is_used() -> None:
    begun = [threading.Event() for _ in range(5)]

    def items() -> Iterator[int]:
        for k in range(5):
            begun[k].set()
            yield k

    for k in ahead(items()):
        assert k == 4 or begun[k + 1].wait(10), "nobody makes the next item meanwhile"
        assert k > 2 or not begun[k + 2].is_set(), "more than one item is ahead of its reader"
    assert list(ahead(range(7))) == [*range(7)]
    assert list(ahead([])) == []


def test_what_an_item_raises_is_raised_in_its_place_and_a_reader_may_stop() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("the third is bad")

    seen = []
    with pytest.raises(ValueError, match="the third is bad"):
        for k in ahead(items()):
            seen.append(k)
    assert seen == [1, 2]
    before = threading.active_count()
    early = ahead(iter(range(100)))
    assert next(early) == 0
    early.close()
    assert threading.active_count() == before
