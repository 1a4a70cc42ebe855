"""A short round of `make chaos`: two kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.chaos import chaos


@pytest.mark.e2e
def test_stages_killed_at_random_moments_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    assert chaos(tmp_path, seed=1, kills=2) >= 2
