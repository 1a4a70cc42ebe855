"""The page on real photos is made from its JSON file, and that holds no photo."""

from __future__ import annotations

import json

from tests.support.study import RESULT, page_of, picture_of


def test_the_page_is_what_the_finished_runs_say() -> None:
    assert RESULT.with_suffix(".md").read_text(encoding="utf-8") == page_of(RESULT)
    assert RESULT.with_suffix(".svg").read_text(encoding="utf-8") == picture_of(RESULT)


def test_every_run_has_its_chance_beside_it() -> None:
    said = json.loads(RESULT.read_text(encoding="utf-8"))
    assert {metric for run in said["runs"] for metric in run["metrics"]} == said["chance"].keys()
    assert all(run["metrics"]["rsum"] > said["chance"]["rsum"] for run in said["runs"])
