"""A short, fixed part of what `make chaos` draws: faults of five kinds fall on one walk, which ends in the bytes of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.lab.chaos import FIRST, disturbed, quiet
from tests.support.lab.cluster import lab
from tests.support.lab.machines import asked_for, missing

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(why := missing() or asked_for()), reason=f"NOT TESTED: faults of a cluster; {why}")]


def test_a_walk_on_which_five_faults_fall_ends_in_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    with lab(tmp_path, workers=3) as there:
        usual, expected = quiet(there)
        row = disturbed(there, 1, FIRST[0], usual, expected)
    assert row.get("different") == [], row
    assert sum(len(submission["blows"]) for submission in row["submissions"]) >= 3, "stages ended before the faults fell"
