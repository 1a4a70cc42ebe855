"""Kernels that torch.compile keeps on disk, on one machine with two sets of CPU instructions: as if two machines shared the folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import ROOT

FUSED = """
import torch
from itm.evaluation.scoring import score_matrix
from itm.matchers.late.uarda import UARDA
from tests.support.late_worlds import SMALL, captions_of, images_of
torch.manual_seed(0)
matcher = UARDA(**SMALL, eval_threshold=0.1).eval()
images, captions = images_of(6, 5), captions_of([3, 7, 4, 7, 7, 2, 4, 9])
eager = score_matrix(matcher, images, captions)
matcher.fuse_tiles = True
torch.testing.assert_close(score_matrix(matcher, images, captions), eager, atol=2e-6, rtol=1e-5)
print(torch.backends.cpu.get_cpu_capability())
"""


def test_kernels_of_another_set_of_instructions_are_not_used(tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX-512: there is no second set of instructions to compile for")
    plain = {k: v for k, v in os.environ.items() if k not in ("TORCHINDUCTOR_CACHE_DIR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")}
    old = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    seen = []
    for setting in ({}, old):
        env = plain | {"TMPDIR": str(tmp_path), "PYTHONWARNINGS": "ignore"} | setting
        done = subprocess.run([sys.executable, "-c", FUSED], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout.strip())
    assert seen == ["AVX512", "AVX2"]
