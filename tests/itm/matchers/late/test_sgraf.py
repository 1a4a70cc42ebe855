"""SGR and SAF: batch norm as the authors' caption loop does it, and what must not change a score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itm.matchers.late.sgraf import SAF, SGR, AttentionFiltration, SlotNorm
from tests.support.late_worlds import SMALL, captions_of, encoded, gradients, images_of, padded, scores_of

MATCHERS = [SGR, SAF]


def small(model: Any, **options: Any) -> Any:
    matcher = model(**{**SMALL, "sim_dim": 5, "regions": 4, "dropout": 0.0, **options}).double()
    for parameter in matcher.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return matcher


@pytest.mark.parametrize("model", MATCHERS)
def test_padding_blocks_and_order_do_not_change_a_score(model: Any):
    matcher = small(model).eval()
    left, right = encoded(matcher, images_of(5, 4), captions_of([6, 2, 3, 1]))
    want = matcher.score(left, right)
    assert want.std() > 1e-3
    torch.testing.assert_close(matcher.score(left, padded(right, 3)), want, atol=1e-12, rtol=0)
    blocks = [torch.cat([matcher.score(left[i : i + 2], right[j : j + 1]) for j in range(4)], 1) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(blocks), want, atol=1e-12, rtol=0)
    rows, columns = torch.randperm(5), torch.randperm(4)
    torch.testing.assert_close(matcher.score(left[rows], right[columns]), want[rows][:, columns], atol=1e-12, rtol=0)


@pytest.mark.parametrize("model", MATCHERS)
def test_chunking_and_recomputation_change_no_score_gradient_or_running_value(model: Any):
    images, captions = images_of(3, 4), captions_of([2, 7, 3, 7, 1])
    matcher = small(model).train()
    start = {name: value.clone() for name, value in matcher.state_dict().items()}
    results = []
    for elements, recompute in ((1 << 24, False), (1, False), (1, True)):
        matcher.load_state_dict(start)
        matcher.chunk_elements, matcher.recompute = elements, recompute
        scores = scores_of(matcher, images, captions)
        found = gradients(matcher, scores.square().sum())
        results.append({"scores": scores.detach(), **found, **{f"after {k}": v.clone() for k, v in matcher.state_dict().items()}})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in other.items():
            torch.testing.assert_close(value, results[0][name], atol=1e-10, rtol=1e-9)


def test_scores_without_gradient_take_the_fused_path_and_are_the_same():
    matcher = small(SGR).eval()
    left, right = encoded(matcher, images_of(3, 4), captions_of([4, 2]))
    with torch.no_grad():
        fused = matcher.score(left, right)
    torch.testing.assert_close(fused, matcher.score(left, right), atol=1e-12, rtol=0)


def caption_loop(module: AttentionFiltration, nodes: Tensor, lengths: list[int]) -> list[Tensor]:
    """The filtration gates as the authors' forward computes them: one `BatchNorm1d` call a caption, in order."""
    gates = []
    for caption, length in enumerate(lengths):
        logits = module.attn_sim_w(nodes[:, caption, :length]).transpose(1, 2)
        gates.append(module.bn(logits).sigmoid().squeeze(1))
    return gates


def test_the_filtration_norm_is_updated_once_a_caption_as_in_a_loop():
    ours, theirs = AttentionFiltration(5).double().train(), AttentionFiltration(5).double().train()
    theirs.load_state_dict(ours.state_dict())
    lengths = [7, 5, 5, 2]
    nodes, mask = torch.randn(3, 4, 7, 5, dtype=torch.float64), torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    _, statistics = ours(nodes, mask)
    ours.track(statistics)
    caption_loop(theirs, nodes, lengths)
    for name, value in theirs.bn.state_dict().items():
        torch.testing.assert_close(ours.bn.state_dict()[name], value, atol=1e-14, rtol=0)


def test_slot_norm_ignores_padded_regions_and_equals_batch_norm_without_any():
    norm, plain = SlotNorm(3).double().train(), nn.BatchNorm1d(3).double().train()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    mask = torch.tensor([[True, True, False]] * 2 + [[True, False, False]] * 2)
    got = norm(x, mask)
    first = plain(x[:, :1].expand(-1, 3, -1))[:, 0]
    torch.testing.assert_close(got[:, 0], first)
    other = x.clone()
    other[~mask] = 9.0
    assert torch.equal(norm(other, mask)[mask], got[mask])
    assert float(norm.running_var[2]) == 1.0
    fresh = SlotNorm(3).double().train()
    torch.testing.assert_close(fresh(x, torch.ones_like(mask)), nn.BatchNorm1d(3).double().train()(x))


@pytest.mark.parametrize("model", MATCHERS)
def test_images_with_fewer_real_regions_score_and_train(model: Any):
    matcher = small(model).train()
    images, captions = images_of(3, 4, [4, 1, 2]), captions_of([3, 2, 1])
    found = gradients(matcher, scores_of(matcher, images, captions).sum())
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert found.keys() == dict(matcher.named_parameters()).keys()


@pytest.mark.parametrize("model", MATCHERS)
def test_one_image_scores_in_evaluation_and_is_refused_in_training(model: Any):
    matcher = small(model)
    images, captions = images_of(1, 4), captions_of([1])
    assert 0 < scores_of(matcher.eval(), images, captions).item() < 1
    with pytest.raises(ValueError, match="at least 2 images"):
        scores_of(matcher.train(), images, captions)


def test_a_region_count_other_than_the_slots_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"1 regions an image, but the batch norm of SAF has 4 slots: set model\.options\.regions=1"):
        small(SAF).encode_images(images_of(2, 1))
    single = small(SGR, regions=1).eval()
    assert scores_of(single, images_of(2, 1), captions_of([2])).shape == (2, 1)


@pytest.mark.parametrize("model", MATCHERS)
def test_the_options_rebuild_the_model(model: Any):
    extra = {"steps": 2} if model is SGR else {}
    matcher = small(model, **extra).eval()
    rebuilt = model(vocab_size=20, **matcher.options).double().eval()
    rebuilt.load_state_dict(matcher.state_dict())
    images, captions = images_of(2, 4), captions_of([3, 2])
    assert torch.equal(scores_of(rebuilt, images, captions), scores_of(matcher, images, captions))


def test_the_published_sizes_have_the_published_number_of_weights():
    with torch.device("meta"):
        sizes = {model: sum(p.numel() for p in model(vocab_size=8481).parameters()) for model in MATCHERS}
    assert sizes == {SGR: 18_109_175, SAF: 17_517_306}
