"""UARDA: the threshold against a grid, its update by hand, the attention against a literal pair loop, and exact exclusion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from itm.kinds import build_part
from itm.losses.triplet import triplet_loss
from itm.matchers.late.naaf import NaafState, naaf_walk
from itm.matchers.late.uarda import UARDA
from itm.matchers.late.uarda_separation import samples, separation_loss
from itm.matchers.norms import l2
from itm.methods import METHODS
from itm.types import Batch, Captions, Encoded, Images, SoftLabels
from tests.support import GOLDEN
from tests.support.late_worlds import SMALL, captions_of, encoded, gradients, images_of, padded, scores_of
from tests.support.replay.__main__ import replay
from tests.support.replay.uarda import find


def small(**options: Any) -> Any:
    return UARDA(**SMALL, **options).double()


def set_threshold(matcher: Any, t: float) -> None:
    for state in matcher.thresholds.values():
        state.t.fill_(t)
        state.t_safe.fill_(t)


def pair(query: Tensor, context: Tensor, t: float, weights: str) -> Tensor:
    """Score of one direction of one pair, docs/methods/uarda.md#attention word by word. query (Q,D), context (C,D)."""
    s = query @ context.T
    if weights == "scan":
        above = (s - t).relu()
        logits = 9 * above / (above.square().sum(0, keepdim=True).sqrt() + 1e-8)
    else:
        logits = 20 * (s - t)
    r = []
    for i in range(len(query)):
        kept = s[i] > t
        if not kept.any():
            r.append(torch.zeros((), dtype=s.dtype))
            continue
        e = logits[i][kept].exp() - (1 if weights == "expm1" else 0)
        attended = ((e / e.sum())[:, None] * context[kept]).sum(0)
        r.append(query[i] @ attended / attended.norm())
    return torch.stack(r).mean()


@pytest.mark.parametrize("weights", ["softmax", "expm1", "scan"])
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_scores_and_gradients_equal_the_pair_loop_also_where_nothing_passes(direction: str, weights: str):
    matcher = small(direction=direction, weights=weights).eval()
    set_threshold(matcher, 0.55)
    images, captions = images_of(4, 5, [5, 1, 3, 4]), captions_of([6, 1, 2])
    left, right = encoded(matcher, images, captions)
    rows = []
    for v, m in zip(left.parts, left.mask, strict=True):
        for w, n in zip(right.parts, right.mask, strict=True):
            halves = {"t2i": lambda v=v[m], w=w[n]: pair(w, v, 0.55, weights), "i2t": lambda v=v[m], w=w[n]: pair(v, w, 0.55, weights)}
            rows.append(sum(halves[d]() for d in matcher.thresholds))
    want = torch.stack(rows).view(4, 3)
    assert bool((want == 0).any())
    got = matcher.score(left, right)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    loss = gradients(matcher, scores_of(matcher, images, captions).square().sum())
    assert all(bool(g.isfinite().all()) for g in loss.values())


def test_pair_loop_gradients_are_the_same():
    matcher = small().eval()
    set_threshold(matcher, 0.05)
    images, captions = images_of(2, 4), captions_of([3, 3])
    left, right = encoded(matcher, images, captions)
    loop = torch.stack([pair(w, v, 0.05, "softmax") for v in left.parts for w in right.parts]).square().sum()
    want, got = gradients(matcher, loop), gradients(matcher, scores_of(matcher, images, captions).square().sum())
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("direction", ["t2i", "both"])
def test_padding_blocks_and_order_do_not_change_a_score(direction: str):
    matcher = small(direction=direction).eval()
    set_threshold(matcher, 0.1)
    left, right = encoded(matcher, images_of(5, 4), captions_of([6, 2, 3, 1]))
    want = matcher.score(left, right)
    torch.testing.assert_close(matcher.score(padded(left, 2), padded(right, 3)), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat([matcher.score(left[:3], right), matcher.score(left[3:], right)]), want, atol=1e-12, rtol=0)
    rows, columns = torch.randperm(5), torch.randperm(4)
    torch.testing.assert_close(matcher.score(left[rows], right[columns]), want[rows][:, columns], atol=1e-12, rtol=0)


def trained_batch(matcher: Any, rows: int = 12) -> tuple[Tensor, Tensor]:
    """Scores in training with regions that match their captions well enough to be ranked first now and then."""
    images, captions = images_of(rows, 4), captions_of([5] * rows)
    matcher.train()
    return scores_of(matcher, images, captions), torch.eye(rows, dtype=torch.bool)


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_a_training_step_moves_the_threshold_of_the_next_step_only(direction: str):
    matcher = small(direction=direction, threshold={"min_words": 3, "mismatch": "easiest", "kappa": 0.0})
    scores, _ = trained_batch(matcher, 30)
    assert all(state.t.item() == 0 for state in matcher.thresholds.values())
    positives = torch.zeros(30, 30, dtype=torch.bool)
    positives[scores.argmax(0), torch.arange(30)] = True
    positives[torch.arange(30), scores.argmax(1)] = True
    assert matcher.training_terms(scores, positives, 30) == {}
    for state in matcher.thresholds.values():
        assert 0 < state.t.item() < 1
        assert state.statistics[0] > state.statistics[2]
    assert matcher.training_terms(scores, positives, 30) == {}
    assert all(int(state.updates) == 1 for state in matcher.thresholds.values()), "one observation moves it once"
    matcher.eval()
    before = {name: value.clone() for name, value in matcher.state_dict().items()}
    scores_of(matcher, images_of(3, 4), captions_of([2, 2]))
    assert all(torch.equal(value, before[name]) for name, value in matcher.state_dict().items())


def test_samples_come_from_captions_ranked_right_and_from_wrong_images_only():
    matcher = small(threshold={"mismatch": "hardest", "min_words": 1})
    images, captions = images_of(5, 3), captions_of([4, 3, 2, 4, 4])
    matcher.train()
    left, right = encoded(matcher, images, captions)
    scores = matcher.score(left, right)
    own = torch.eye(5, dtype=torch.bool)
    own[scores.argmax(0)[0], 0] = True
    matched, mismatched = samples(matcher.observed["t2i"], own, "hardest", 0)
    want_matched, want_mismatched = [], []
    for t in range(5):
        top = int(scores[:, t].argmax())
        if own[top, t]:
            wrong = int(scores[:, t].masked_fill(own[:, t], -9).argmax())
            words = right.parts[t, right.mask[t]]
            want_matched.append((words @ left.parts[top].T).amax(1))
            want_mismatched.append((words @ left.parts[wrong].T).amax(1))
    torch.testing.assert_close(matched, torch.cat(want_matched))
    torch.testing.assert_close(mismatched, torch.cat(want_mismatched))


@pytest.mark.parametrize("kind", ["cost", "hinge"])
def test_the_separating_loss_pushes_matched_up_and_mismatched_down(kind: str):
    matcher = small(separation={"weight": 0.05, "kind": kind}, threshold={"min_words": 3})
    set_threshold(matcher, 0.3)
    matched, mismatched = torch.full((6,), 0.28).double(), torch.full((6,), 0.31).double()
    matched += 0.05 * torch.arange(6) / 6
    mismatched -= 0.05 * torch.arange(6) / 6
    for x in (matched, mismatched):
        x.requires_grad_()
    separation_loss(matched, mismatched, torch.tensor(0.3), matcher.separation, 2.0).backward()
    assert matched.grad.sum() < 0 < mismatched.grad.sum()
    scores, _ = trained_batch(matcher, 20)
    losses = matcher.training_terms(scores, scores == scores.amax(0), 20)
    losses["separation"].backward()
    assert all(bool(p.grad.isfinite().all()) for p in matcher.parameters() if p.grad is not None)


def test_naaf_mode_scores_each_caption_with_what_the_captions_before_it_left():
    matcher = small(threshold={"mode": "naaf_compat"}).train()
    regions = l2(torch.randn(40, 6, 10, dtype=torch.float64))
    words = l2(torch.cat([regions, regions], 1) + 0.2 * torch.randn(40, 12, 10, dtype=torch.float64))
    left = Encoded(parts=regions, mask=torch.ones(40, 6, dtype=torch.bool))
    right = Encoded(parts=words, mask=torch.ones(40, 12, dtype=torch.bool))
    set_threshold(matcher, 0.2)
    got = matcher.score(left, right)
    state = NaafState(0.2, 0.2)
    raw = torch.einsum("tld,ird->itlr", right.parts, left.parts)
    columns: list[Tensor] = []

    def score(caption: int, t: float) -> Tensor:
        columns.append(torch.stack([pair(right.parts[caption], v, t, "softmax") for v in left.parts]))
        return columns[-1].detach()

    naaf_walk(raw.amax(-1).detach(), right.mask, score, state, 2.0)
    torch.testing.assert_close(got, torch.stack(columns, 1), atol=1e-9, rtol=1e-9)
    assert matcher.thresholds["t2i"].t.item() == pytest.approx(state.t, abs=1e-12)
    assert 0.2 < state.t < 1


def test_evaluation_uses_the_chosen_threshold_and_a_model_keeps_it():
    images, captions = images_of(3, 4), captions_of([3, 2])
    matcher = small(eval_threshold=0.4).eval()
    matcher.thresholds["t2i"].t.fill_(0.1)
    matcher.thresholds["t2i"].t_safe.fill_(0.4)
    rebuilt = UARDA(vocab_size=20, **{**matcher.options, "eval_threshold": "t_safe"}).double().eval()
    rebuilt.load_state_dict(matcher.state_dict())
    assert torch.equal(scores_of(rebuilt, images, captions), scores_of(matcher, images, captions))
    rebuilt.eval_threshold = "t"
    assert not torch.equal(scores_of(rebuilt, images, captions), scores_of(matcher, images, captions))


def test_training_on_fixed_pairs_lowers_the_loss_without_collapse():
    matcher = UARDA(**SMALL, threshold={"min_words": 20, "warmup_steps": 10}).train()
    images, captions = images_of(16, 4), captions_of([5] * 16)
    optimiser = torch.optim.Adam(matcher.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        scores = scores_of(matcher, images, captions)
        loss = triplet_loss(scores, hardest=False)
        matcher.training_terms(scores, torch.eye(16, dtype=torch.bool), 16)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    report = matcher.thresholds["t2i"].report()
    assert losses[-1] < 0.1 * losses[0]
    assert report["t"] > 0
    assert report["pruned_matched"] < 0.5
    assert report["pruned_matched"] < report["pruned_mismatched"]


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match="direction is t2i, i2t or both"):
        small(direction="up")
    with pytest.raises(ValueError, match=r"ThresholdOptions: alfa.*known: alpha"):
        small(threshold={"alfa": 1.0})
    with pytest.raises(ValueError, match="eval_threshold is t, t_safe or a number"):
        small(eval_threshold="safe")
    with pytest.raises(ValueError, match="threshold_grad=implicit needs weights=expm1, as t cancels in softmax weights"):
        small(threshold_grad="implicit")
    with pytest.raises(ValueError, match="threshold_grad is constant or implicit, not 'on'"):
        small(threshold_grad="on")
    with pytest.raises(ValueError, match="naaf_compat knows direction=t2i only"):
        small(direction="both", threshold={"mode": "naaf_compat"})


@pytest.mark.parametrize("case", list(find(GOLDEN)), ids=lambda case: case.name)
def test_the_golden_numbers_are_reproduced(case):
    line, passed = replay(case)
    assert passed, line


@pytest.mark.parametrize("kind", ["matching", "cusa"])
def test_every_method_moves_the_threshold_of_a_training_uarda(kind: str):
    matcher = UARDA(vocab_size=20, image={"kind": "regions", "in_width": 6, "width": 8}, text={"kind": "gru", "word_dim": 4, "width": 8})
    options = {"loss": "triplet"} if kind == "matching" else {"triplet": {}, "csa": {}, "usa": {}}
    method = build_part(METHODS, kind, options, "method", matcher=matcher).train()
    ids = torch.arange(6)
    images = Images(image_id=ids, regions=torch.randn(6, 5, 6), mask=torch.ones(6, 5, dtype=torch.bool))
    captions = Captions(torch.randint(4, 20, (6, 7)), torch.ones(6, 7, dtype=torch.bool), ids)
    losses = method(Batch(images, captions, SoftLabels(torch.randn(6, 3), torch.randn(6, 3))))
    assert all(loss.isfinite() for loss in losses.values())
    assert int(next(iter(matcher.thresholds.values())).steps) == 1
