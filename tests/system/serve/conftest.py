"""One service on Ray Serve over two models of a registry, as `itm serve` starts it, for the tests of one file."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.support.serving_process import two_models


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    with two_models(tmp_path_factory.mktemp("service")) as service:
        yield service
