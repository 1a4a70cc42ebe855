"""How torch's CPU threads wait, in processes that start as a user starts them: with nothing in the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import ROOT


def spins_of(code: str, *arguments: str, **given: str) -> int:
    """How often a waiting thread spins before it sleeps, as the OpenMP runtime of torch says when a fresh process loads it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment = clean | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT), **given}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not lines:
        pytest.skip("the OpenMP runtime of this torch does not show its settings")
    return int(lines[0].partition("=")[2].strip().strip("'"))


@pytest.fixture
def scores(tmp_path: Path) -> list[str]:
    np.save(tmp_path / "s.npy", np.eye(3, dtype=np.float32))
    ids = ["a", "b", "c"]
    (tmp_path / "ids.json").write_text(json.dumps({"image_ids": ids, "caption_ids": ids, "caption_image_ids": ids}))
    return ["evaluate", "--scores", str(tmp_path / "s.npy"), "--truth", str(tmp_path / "ids.json")]


ITM = "import sys; from pipelines.cli import main; assert main(sys.argv[1:]) == 0; assert 'torch' in sys.modules"


def test_threads_of_every_stage_sleep_while_they_wait_and_spin_where_the_user_says_so(scores: list[str]) -> None:
    assert spins_of("import torch") > 0
    assert spins_of(ITM, *scores) == 0
    assert spins_of(ITM, *scores, OMP_WAIT_POLICY="active") > 0


def test_threads_of_a_served_model_sleep_while_they_wait() -> None:
    assert spins_of("import sys; import itm.pyfunc; assert 'torch' in sys.modules") == 0
