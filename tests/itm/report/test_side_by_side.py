"""Curves of two runs in one plot: their points against the evaluations that they come from."""

from __future__ import annotations

import re

import pytest
import torch

from itm.report.side_by_side import found_by_rank, score_curves, standardised

RANKS = {"queries": 4, "gallery": 4, "first": [1, 2, 3, 4], "share": [0.5, 0.25, 0.25, 0.0], "chance": [0.25] * 4}


def test_the_share_found_by_rank_grows_to_all_queries_for_every_run_beside_chance():
    runs = {"a": {"ranks": {"t2i": RANKS}}, "b": {"ranks": {"t2i": RANKS | {"share": [1.0, 0.0, 0.0, 0.0]}}}}
    drawn = found_by_rank(runs, "t2i")
    lines = [[float(y) for _, y in (p.split(",") for p in points.split())] for points in re.findall(r'points="([^"]+)"', drawn)]
    assert len(lines) == 3
    bottom, top = 220.0, 12.0
    shares = [[100 * (bottom - y) / (bottom - top) for y in line] for line in lines]
    assert shares[0] == pytest.approx([50, 75, 100, 100]) and shares[1] == pytest.approx([100] * 4)
    assert shares[2] == pytest.approx([25, 50, 75, 100])
    assert re.findall(r'text-anchor="middle">([^<]+)<', drawn) == ["1", "2", "3", "4"]


def test_runs_that_ranked_another_gallery_share_no_plot():
    other = {"ranks": {"t2i": RANKS | {"first": [1, 2], "gallery": 2}}}
    assert found_by_rank({"a": {"ranks": {"t2i": RANKS}}, "b": other}, "t2i") == ""
    assert found_by_rank({"a": {}, "b": {}}, "t2i") == ""


def test_scores_are_drawn_in_deviations_of_the_pairs_that_do_not_hold():
    torch.manual_seed(0)
    scores = 3.0 + 0.5 * torch.randn(100_000)
    edges = torch.linspace(float(scores.min()), float(scores.max()), 49)
    share = torch.histc(scores, 48, float(edges[0]), float(edges[-1])) / len(scores)
    points = standardised({"edges": edges.tolist(), "negatives": share.tolist()}, "negatives")
    width = points[1][0] - points[0][0]
    assert sum(value for _, value in points) * width == pytest.approx(1, abs=1e-6)
    assert sum(z * value for z, value in points) * width == pytest.approx(0, abs=1e-6)
    assert sum(z**2 * value for z, value in points) * width == pytest.approx(1, abs=1e-6)
    histogram = {"edges": edges.tolist(), "negatives": share.tolist(), "positives": share.tolist()}
    assert score_curves({"a": {"histogram": histogram}, "b": {}}).count("<polyline") == 2
