"""`itm bench pruning`: what is timed is the same score, at the pruned share that it states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from itm.benchmarks import pruning
from itm.benchmarks.measuring import world
from itm.matchers.late.base import parts_of
from itm.matchers.late.uarda import UARDA
from pipelines.cli import stage_main


@torch.no_grad()
def test_the_engine_that_builds_vectors_gives_our_scores_with_and_without_pruning():
    where = world(6, 24, 1, "cpu")
    mask = parts_of(where.captions)[1]
    for share in (0.0, 0.6):
        t = pruning.threshold_at(where, "t2i", share)
        want = UARDA(vocab_size=4, eval_threshold=t).eval().score(where.images, where.captions)
        for pruned in (False, True):
            words = torch.zeros(6, *mask.shape)
            words[:, mask] = pruning.with_vectors(where, t, pruned)
            torch.testing.assert_close(words.sum(-1) / mask.sum(-1), want, atol=1e-5, rtol=0)


def test_the_table_states_the_share_that_is_pruned_and_the_json_has_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pruning, "SHARES", (0.0, 0.9))
    sizes = ["--images", "8", "--captions", "40", "--rounds", "1"]
    assert stage_main("bench", ["pruning", *sizes, "--json", str(tmp_path / "bench.json")]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["pruning"]
    assert [(row["direction"], round(row["p"], 1)) for row in rows] == [("t2i", 0.0), ("t2i", 0.9), ("i2t", 0.0), ("i2t", 0.9)]
    assert all(row["difference"] < 1e-6 for row in rows)
    assert "at most" in capsys.readouterr().out
