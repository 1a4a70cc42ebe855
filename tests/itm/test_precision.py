"""What a precision and a block size may change in a score, for every late-interaction matcher, as stated in `score_matrix`."""

import warnings
from typing import Any

import pytest
import torch

from itm.evaluation import PRECISIONS as OFFERED
from itm.evaluation.scoring import score_matrix
from itm.matchers.late.base import gram, raw_scores
from itm.matchers.norms import full, guarded_norm
from itm.precision import PRECISIONS, bf16_cost, resolve_precision, warn_if_slow
from tests.support.late_worlds import captions_of, images_of
from tests.support.wide_matchers import KINDS, WIDE


@torch.no_grad()
def world(kind: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    matcher = kind(**WIDE, **options).eval()
    return matcher, matcher.encode_images(images_of(24, 5)), matcher.encode_captions(captions_of([2 + n % 9 for n in range(60)]))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_block_size_changes_a_score_by_float32_rounding_at_most(kind, options, monkeypatch):
    matcher, images, captions = world(kind, options)
    whole = score_matrix(matcher, images, captions)
    for block, columns in ((1, 60), (7, 11), (24, 4)):
        monkeypatch.setattr("itm.evaluation.scoring.TILE_CAPTIONS", columns)
        torch.testing.assert_close(score_matrix(matcher, images, captions, block=block), whole, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_bf16_scores_are_not_rounded_to_bf16_and_keep_the_order_of_clear_pairs(kind, options):
    matcher, images, captions = world(kind, options)
    exact, rough = (score_matrix(matcher, images, captions, precision=precision) for precision in ("fp32", "bf16"))
    spread = float(exact.std())
    assert 0 < float((exact - rough).abs().max()) < spread
    assert len(rough.unique()) > 0.9 * len(exact.unique())
    assert not torch.equal(rough, rough.bfloat16().float())
    ahead = exact[:, :, None] - exact[:, None, :] > spread
    assert bool((rough[:, :, None] > rough[:, None, :])[ahead].float().mean() > 0.995)


def test_norms_gram_matrices_and_similarities_are_float32_under_autocast():
    parts = torch.randn(3, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert raw_scores(parts, parts).dtype == torch.float32
        assert torch.equal(gram(parts), parts @ parts.transpose(1, 2)) is False  # the plain product is bfloat16 here
        assert guarded_norm(parts.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(gram(parts), parts @ parts.transpose(1, 2), atol=1e-6, rtol=1e-6)
    assert full(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_scoring_leaves_the_number_of_threads_and_the_precision_of_products_as_they_were():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    matcher, images, captions = world(*KINDS[0])
    for precision in ("fp32", "tf32", "bf16"):
        score_matrix(matcher, images, captions, precision=precision)
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize(("cost", "warned"), [(1.7, 1), (0.6, 0)])
def test_bf16_warns_on_a_cpu_where_it_is_slower_than_fp32(cost, warned, monkeypatch):
    monkeypatch.setattr("itm.precision.bf16_cost", lambda: cost)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for precision, device in (("bf16", "cpu"), ("fp32", "cpu"), ("bf16", "cuda")):
            warn_if_slow(precision, torch.device(device))
    assert [str(w.message) for w in said] == ["bf16 is slower than fp32 on this CPU (1.7 x the time of a product): use fp32"] * warned


def test_the_cost_of_bf16_is_the_least_time_of_each_kind_of_product_over_the_other(monkeypatch):
    measured = {torch.bfloat16: iter([9.0, 3.0, 5.0, 4.0, 6.0, 7.0, 8.0]), torch.float32: iter([4.0, 2.5, 7.0, 2.0, 3.0, 6.0, 5.0])}
    monkeypatch.setattr("itm.precision._seconds", lambda rows: next(measured[rows.dtype]))
    assert bf16_cost.__wrapped__() == 3.0 / 2.0


def test_the_names_that_a_command_line_offers_are_those_that_have_a_meaning():
    assert OFFERED == PRECISIONS
    for name in ("fp32", "auto"):
        assert resolve_precision(name, torch.device("cpu")) == "fp32"
    with pytest.raises(ValueError, match="unknown precision 'fp8'; known: fp32, tf32, bf16, fp16, auto"):
        resolve_precision("fp8", torch.device("cpu"))
