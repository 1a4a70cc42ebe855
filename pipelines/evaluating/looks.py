"""What evaluation.json says for the report besides numbers: when and where it was made, and where the matcher looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from itm.data.formats import Json
from itm.environment import environment
from itm.evaluation.dataset import EncodedSplit
from itm.report.attended import attended

PAIRS = 3


def for_the_page(matchers: Sequence[Any], seen: Sequence[EncodedSplit], result: Json) -> Json:
    """`environment`, and `attention` for some captions that found their image, by the first of the matchers that attends.

    seen: the split as each matcher sees it.
    """
    right = [row for row in result["examples"]["t2i"] if row["answer"]["row"] == row["hits"][0]["row"]]
    pairs = [(row["answer"]["row"], row["query"]) for row in right[:PAIRS]]
    looks = (attended(matcher, split, pairs) for matcher, split in zip(matchers, seen, strict=True))
    found = next(filter(None, looks), [])
    return {"environment": environment()} | ({"attention": found} if found else {})
