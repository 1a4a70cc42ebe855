"""Pruned scoring gives the scores of unpruned scoring, whatever is pruned, and says what it did."""

from typing import Any

import pytest
import torch

from itm.matchers.late import tiles
from itm.matchers.late.base import raw_scores
from itm.matchers.late.uarda import UARDA
from itm.matchers.late.uarda_pruned import BREAK_EVEN, PARTS, Pruning
from tests.support.late_worlds import SMALL, captions_of, encoded, images_of


@torch.no_grad()
def world(**options: Any) -> tuple[Any, Any, Any]:
    matcher = UARDA(**SMALL, **options).eval()
    left, right = encoded(matcher, images_of(6, 5, [5, 1, 3, 4, 5, 2]), captions_of([6, 1, 2, 6, 5, 3, 4]))
    return matcher, left, right


@torch.no_grad()
def both(matcher: Any, left: Any, right: Any, prune: Any = "on") -> tuple[Any, Any, dict[str, Any]]:
    matcher.pruning = None
    want = matcher.score(left, right)
    matcher.pruning = Pruning(prune)
    return matcher.score(left, right), want, matcher.pruning.report()


@pytest.mark.parametrize("weights", ["softmax", "expm1", "scan"])
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
@pytest.mark.parametrize("t", [0.02, 0.3, 0.7])
def test_pruned_scores_are_the_unpruned_scores(direction, weights, t):
    matcher, left, right = world(direction=direction, weights=weights, eval_threshold=t)
    got, want, report = both(matcher, left, right)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert torch.equal(got == 0, want == 0)
    assert set(report["engine"].values()) == {"all" if weights == "scan" else "packed"}


@pytest.mark.parametrize(("t", "p"), [(-1.1, 0.0), (1.1, 1.0)])
def test_nothing_pruned_and_everything_pruned(t, p):
    matcher, left, right = world(eval_threshold=t)
    got, want, report = both(matcher, left, right)
    assert report["p"] == p
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert bool((got == 0).all()) == (p == 1.0)


@pytest.mark.parametrize("scores", [1, 40, 1 << 20])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_tiles_of_any_size_skip_what_is_pruned_and_count_it(direction, scores, monkeypatch):
    monkeypatch.setitem(tiles.TILE_SCORES, "cpu", scores)
    monkeypatch.setitem(tiles.IMAGES, "cpu", 4)
    matcher, left, right = world(direction=direction, eval_threshold=0.3)
    want = matcher.score(left, right)  # with gradient: neither tiles nor pruning
    with torch.no_grad():
        matcher.pruning = Pruning("on")
        assert matcher.cuts_tiles(right)
        torch.testing.assert_close(matcher.score(left, right), want.detach(), atol=1e-6, rtol=0)
    (items, seen), (words, real) = (left.parts, left.mask), (right.parts, right.mask)
    raw = torch.einsum("ird,tld->itrl", items, words).masked_fill(~(seen[:, None, :, None] & real[None, :, None, :]), -2)
    top, asked = (raw.amax(2), real[None]) if direction == "t2i" else (raw.amax(3), seen[:, None])
    cut = ((top <= 0.3) & asked).sum() / asked.expand_as(top).sum()
    assert matcher.pruning.report()["p"] == pytest.approx(float(cut))


def test_a_similarity_that_equals_the_threshold_is_dropped_by_both_engines():
    matcher, left, right = world()
    raw = raw_scores(right.parts, left.parts)
    for value in (raw[2, 0, 1, :3].max(), raw[4, 3].max(), raw[0, 5, :3, :5].median()):
        matcher.eval_threshold = float(value)
        got, want, report = both(matcher, left, right)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
        top = raw.masked_fill(~left.mask[:, None, None, :], -torch.inf).amax(-1)
        dropped = (top <= matcher.eval_threshold) & right.mask
        assert report["p"] == pytest.approx(float(dropped.sum()) / (6 * int(right.mask.sum())))


def test_auto_takes_the_engine_that_the_pruned_share_of_the_first_block_asks_for_and_keeps_it():
    matcher, left, right = world(eval_threshold=1.1)
    _, _, report = both(matcher, left, right, "auto")
    assert report["engine"] == {"t2i": "packed"}
    matcher.eval_threshold = -1.1
    with torch.no_grad():
        matcher.score(left, right)
    assert matcher.pruning.report()["engine"] == {"t2i": "packed"}
    _, _, report = both(matcher, left, right, "auto")
    assert report["p"] < BREAK_EVEN and report["engine"] == {"t2i": "all"}


def test_the_report_has_the_share_of_time_of_every_part():
    matcher, left, right = world(eval_threshold=0.3)
    _, _, report = both(matcher, left, right)
    assert set(report["share_of_time"]) == set(PARTS)
    assert sum(report["share_of_time"].values()) == pytest.approx(1.0, abs=1e-3)


def test_training_and_gradients_do_not_see_the_pruning():
    matcher, left, right = world(eval_threshold=0.3)
    matcher.pruning = Pruning("on")
    matcher.score(left, right)
    assert matcher.pruning.report()["p"] is None


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="prune is off, on or auto, not 'maybe'"):
        Pruning("maybe")  # type: ignore[arg-type]
