from __future__ import annotations

import os
from typing import Any

import pytest

from pipelines.on_ray.session import core


@pytest.mark.e2e
def test_as_many_busy_tasks_run_at_once_as_there_are_cores_or_a_little_more(ray_local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On three cores and four CPUs a task takes one of them: two would leave a core idle."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_local, "cluster_resources", lambda: {"CPU": 4.0})  # on a larger machine it has more
    found: dict[int, int] = {}
    for cores in (1, 2, 3, 4, 64):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        found[cores] = core()
    assert found == {1: 4, 2: 2, 3: 1, 4: 1, 64: 1}
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert core() == 1, "a cluster's CPUs are what its nodes say"
