"""The tiled scores without gradient against two independent forms: the plain one that training uses, and the published loops."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from itm.benchmarks.published_loops import naaf_loop, scan_loop, sgraf_loop
from itm.evaluation.scoring import score_matrix
from itm.matchers.late import tiles as tiled
from itm.matchers.late.scan import SCAN
from itm.matchers.late.sgraf import SAF, SGR
from itm.matchers.late.uarda import UARDA
from itm.types import Encoded
from pipelines.cli import stage_main
from tests.support import ROOT

SMALL = {"vocab_size": 20, "image": {"in_width": 7, "width": 10}, "text": {"word_dim": 6, "width": 10}}
LENGTHS = [3, 7, 4, 7, 7, 2, 4, 9]


def parts(regions: int = 5, real: list[int] | None = None) -> tuple[Encoded, Encoded]:
    seen = torch.arange(regions) < torch.tensor(real or [regions] * 6)[:, None]
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    images, words = F.normalize(torch.randn(6, regions, 10) + 0.3, dim=-1), F.normalize(torch.randn(8, 9, 10) + 0.3, dim=-1)
    return Encoded(parts=images * seen[..., None], mask=seen), Encoded(parts=words * mask[..., None], mask=mask)


def matchers():
    for direction in ("t2i", "i2t"):
        for norm in ("clipped_l2norm", "l2norm"):
            for agg in ("LogSumExp", "Mean", "Max", "Sum"):
                yield SCAN(**SMALL, cross_attn=direction, raw_feature_norm=norm, agg_func=agg)
    yield SGR(**SMALL, sim_dim=6, regions=5)
    yield SGR(**SMALL, sim_dim=6, regions=5, steps=1)
    yield SAF(**SMALL, sim_dim=6, regions=5)
    for t in (0.0, 0.35, 2.0):
        yield UARDA(**SMALL, direction="both", eval_threshold=t)


@pytest.mark.parametrize("tile", [1, 60, 1 << 18])
@pytest.mark.parametrize("real", [None, [5, 1, 3, 5, 2, 4]], ids=["full", "ragged"])
def test_tiles_of_any_size_give_the_scores_that_training_computes(monkeypatch, tile, real):
    monkeypatch.setattr(tiled, "TILE_SCORES", {"cpu": tile})
    monkeypatch.setattr(tiled, "IMAGES", {"cpu": 4})
    monkeypatch.setattr("itm.matchers.late.sgraf_tiles.WORDS", {"cpu": tile})
    monkeypatch.setattr("itm.matchers.late.sgraf_tiles.NODES", {"cpu": tile})
    images, captions = parts(real=real)
    for matcher in matchers():
        matcher.eval()
        assert tiled.can_tile(captions) is False
        plain = matcher.score(images, captions).detach()
        with torch.no_grad():
            assert tiled.can_tile(captions)
            torch.testing.assert_close(matcher.score(images, captions), plain, atol=2e-6, rtol=1e-5)


def test_words_that_do_not_stand_at_the_beginning_are_scored_by_the_plain_form():
    images, captions = parts()
    moved = Encoded(parts=captions.parts.flip(1), mask=captions.mask.flip(1))
    for matcher in matchers():
        with torch.no_grad():
            torch.testing.assert_close(matcher.eval().score(images, moved), matcher.score(images, captions), atol=2e-6, rtol=1e-5)


def test_scores_equal_the_published_loops_in_float64():
    images, captions = (Encoded(parts=side.parts.double(), mask=side.mask) for side in parts())
    ragged = [row[:n] for row, n in zip(captions.parts, LENGTHS, strict=True)]
    with torch.no_grad():
        for direction in ("t2i", "i2t"):
            ours = SCAN(**SMALL, cross_attn=direction, agg_func="Mean").double().score(images, captions)
            torch.testing.assert_close(ours, scan_loop(images.parts, ragged, direction, 9.0), atol=1e-12, rtol=0)
        for kind in (SGR, SAF):
            matcher = kind(**SMALL, sim_dim=6, regions=5).double().eval()
            torch.testing.assert_close(matcher.score(images, captions), sgraf_loop(matcher, images.parts, ragged), atol=1e-12, rtol=0)
        ours = UARDA(**SMALL, eval_threshold=0.3).double().eval().score(images, captions)
        torch.testing.assert_close(ours, naaf_loop(images.parts, ragged, 0.3, 20.0), atol=1e-6, rtol=0)  # NAAF adds 1e-8 to the sum


def test_bfloat16_is_near_and_float32_where_it_counts():
    images, captions = parts()
    for matcher in matchers():
        with torch.no_grad():
            exact = matcher.eval().score(images, captions)
            with torch.autocast("cpu", torch.bfloat16):
                rough = matcher.score(images, captions)
        assert rough.dtype == torch.float32
        if not isinstance(matcher, UARDA):  # its threshold is a step: a word near it may go either way
            assert float((exact - rough).abs().max()) < 0.03 * max(1.0, float(exact.abs().max()))


def test_the_benchmark_prints_and_stores_every_ratio(tmp_path, capsys):
    threads = torch.get_num_threads()
    sizes = ["--images", "2", "--captions", "3", "--every", "2", "--rounds", "1"]
    assert stage_main("bench", ["scoring", *sizes, "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.svg")]) == 0
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["SCAN t2i"] * 4 + ["SCAN i2t"] * 4 + ["SGR"] * 2 + ["SAF"] * 2 + ["UARDA"] * 2
    assert max(row["difference"] for row in found["rows"] if row["precision"] == "fp32") < 5e-6
    assert all(row["ratio_cpu"] == pytest.approx(row["ours_cpu"] / row["peer_cpu"]) for row in found["rows"])
    assert (tmp_path / "b.svg").stat().st_size > 1000
    assert "of bound" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own imports
def test_compiled_tiles_give_the_scores_of_eager_ones():
    images, captions = parts(real=[5, 1, 3, 5, 2, 4])
    for matcher in (SAF(**SMALL, sim_dim=6, regions=5), UARDA(**SMALL, eval_threshold=0.35)):
        before = counters["stats"]["unique_graphs"]
        eager = score_matrix(matcher, images, captions)
        assert counters["stats"]["unique_graphs"] == before
        matcher.fuse_tiles = True
        torch.testing.assert_close(score_matrix(matcher, images, captions), eager, atol=2e-6, rtol=1e-5)
        assert counters["stats"]["unique_graphs"] > before


OLD_CPU = """
import torch
from itm.evaluation.scoring import score_matrix
from itm.matchers.late.tiles import has_product
from tests.support.late_worlds import captions_of, images_of
from tests.support.wide_matchers import KINDS, WIDE
assert not has_product(torch.bfloat16), "the setting has no effect: this test shows nothing"
with torch.no_grad():
    for kind, options in KINDS:
        matcher = kind(**WIDE, **options).eval()
        images, captions = images_of(6, 5), captions_of([2, 3, 4, 5])
        exact, rough = (score_matrix(matcher, images, captions, precision=p) for p in ("fp32", "bf16"))
        assert 0 < float((exact - rough).abs().max()) < float(exact.std())
"""


def test_bf16_scores_come_from_torch_where_onednn_has_no_kernel_for_them():
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", OLD_CPU], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
