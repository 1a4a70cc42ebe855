"""Teaching inside the test process (a pytest plugin: `pytest_plugins = ["tests.support.teaching_fixtures"]`)."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from pipelines.teaching import driver as stage
from tests.support.small_teaching import score_here


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Scoring inside this process, without tracking."""
    monkeypatch.setattr(stage, "_score", score_here)
    monkeypatch.setattr(stage, "_tracked", lambda *a: nullcontext())
    return tmp_path
