"""Quiet, bounded defaults for every test; one real local Ray session for those that need it; slow tests last."""

from __future__ import annotations

import os

from pipelines.on_ray.session import quiet

quiet()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("RAY_ADDRESS", None)

import pytest
import torch

torch.set_num_threads(1)


LONGEST = ("test_recipes_as_published.py", "test_train.py", "test_validation.py", "test_switches.py", "test_recipes.py", "test_teach.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests last, the longest files of them first, so that no process is left alone with one. `--dist loadfile` keeps a file in one
    process, which starts its Ray and its servers once."""

    def place(item: pytest.Item) -> int:
        if item.get_closest_marker("e2e") is None and "system" not in item.path.parts:
            return 0
        return 1 + (LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_local():
    """A real local Ray instance with 4 logical CPUs, shared by the session."""
    import ray

    from pipelines.on_ray.session import connect

    connect()
    yield ray
    ray.shutdown()
