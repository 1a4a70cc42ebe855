"""SCAN against a pair-by-pair oracle that builds every attended vector, and its invariances."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from itm.matchers.late.scan import SCAN, Aggregation, Direction, RawNorm
from itm.types import Captions, Images
from tests.support import GOLDEN
from tests.support.late_worlds import SMALL, captions_of, encoded, gradients, images_of, padded, scores_of
from tests.support.replay.__main__ import replay
from tests.support.replay.sgraf import find

MODES = list(product(get_args(Direction), get_args(Aggregation), get_args(RawNorm)))


def pair_score(regions: Tensor, words: Tensor, mode: tuple[str, str, str], lambdas: tuple[float, float]) -> Tensor:
    """Score of one pair without padding, straight from docs/methods/scan.md#score. regions (R,D), words (L,D)."""
    direction, aggregation, norm = mode
    query, context = (words, regions) if direction == "t2i" else (regions, words)
    a = context @ query.T
    if norm.startswith("clipped"):
        a = torch.where(a < 0, 0.1 * a, a)
    if norm.endswith("l2norm"):
        a = a / (a.square().sum(1, keepdim=True).sqrt() + 1e-8)
    elif norm.endswith("l1norm"):
        a = a / (a.abs().sum(1, keepdim=True) + 1e-8)
    elif norm == "softmax":
        a = a.softmax(1)
    attended = (lambdas[0] * a.T).softmax(1) @ context
    r = (query * attended).sum(1) / (query.norm(dim=1) * attended.norm(dim=1)).clamp(min=1e-8)
    if aggregation == "LogSumExp":
        return (lambdas[1] * r).exp().sum().log() / lambdas[1]
    return {"Mean": r.mean(), "Max": r.max(), "Sum": r.sum()}[aggregation]


def oracle(matcher: SCAN, images: Images, captions: Captions) -> Tensor:
    left, right = encoded(matcher, images, captions)
    mode, lambdas = (matcher.cross_attn, matcher.agg_func, matcher.raw_feature_norm), (matcher.lambda_softmax, matcher.lambda_lse)
    rows = [
        [pair_score(v[m], w[n], mode, lambdas) for w, n in zip(right.parts, right.mask, strict=True)]
        for v, m in zip(left.parts, left.mask, strict=True)
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_every_mode_equals_the_pairwise_oracle_with_ragged_words_and_regions(mode: tuple[str, str, str]):
    direction, aggregation, norm = mode
    matcher = SCAN(**SMALL, cross_attn=direction, agg_func=aggregation, raw_feature_norm=norm).double()
    images, captions = images_of(3, 5, [5, 2, 4]), captions_of([6, 1, 3, 4])
    torch.testing.assert_close(scores_of(matcher, images, captions), oracle(matcher, images, captions), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_gradients_equal_those_of_the_pairwise_oracle(direction: str):
    matcher = SCAN(**SMALL, cross_attn=direction).double()
    images, captions = images_of(3, 4), captions_of([5, 2, 3])
    got = gradients(matcher, scores_of(matcher, images, captions).square().sum())
    want = gradients(matcher, oracle(matcher, images, captions).square().sum())
    assert got.keys() == want.keys() == dict(matcher.named_parameters()).keys()
    for name in got:
        torch.testing.assert_close(got[name], want[name], atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("norm", ["clipped_l2norm", "softmax", "l1norm"])
def test_padding_blocks_and_order_do_not_change_a_score(direction: str, norm: str):
    matcher = SCAN(**SMALL, cross_attn=direction, raw_feature_norm=norm).double().eval()
    left, right = encoded(matcher, images_of(5, 4), captions_of([6, 2, 3, 1]))
    want = matcher.score(left, right)
    torch.testing.assert_close(matcher.score(padded(left, 3), padded(right, 2)), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat([matcher.score(left[:2], right), matcher.score(left[2:], right)]), want, atol=1e-12, rtol=0)
    rows, columns = torch.randperm(5), torch.randperm(4)
    torch.testing.assert_close(matcher.score(left[rows], right[columns]), want[rows][:, columns], atol=1e-12, rtol=0)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_one_image_one_region_and_one_word_work(direction: str):
    matcher = SCAN(**SMALL, cross_attn=direction, agg_func="Mean")
    left, right = encoded(matcher, images_of(1, 1), captions_of([1]))
    cosine = (left.parts[0, 0] @ right.parts[0, 0]).view(1, 1)
    torch.testing.assert_close(matcher.score(left, right), cosine)


def test_the_vector_is_the_mean_of_the_real_parts():
    matcher = SCAN(**SMALL)
    _, right = encoded(matcher, images_of(1, 2), captions_of([4, 2]))
    torch.testing.assert_close(right.vector[1], right.parts[1, :2].mean(0))
    assert torch.equal(right.parts[1, 2:], torch.zeros(2, 10))


def test_padding_gives_no_nan_gradient():
    matcher = SCAN(**SMALL)
    found = gradients(matcher, scores_of(matcher, images_of(2, 3, [3, 1]), captions_of([5, 1])).sum())
    assert all(bool(g.isfinite().all()) for g in found.values())


@pytest.mark.parametrize(
    "image", [{"kind": "conv", "image_size": 32}, {"kind": "regions", "in_width": 7, "width": 12, "weight_norm": True}]
)
@pytest.mark.parametrize(
    "text", [{"kind": "gru", "word_dim": 4, "width": 10, "layers": 2, "bidirectional": False}, {"kind": "pooled_gru", "hidden": 8}]
)
def test_any_image_encoder_meets_any_text_encoder_in_unit_parts_of_one_width(image: dict, text: dict):
    matcher = SCAN(vocab_size=20, image=image, text=text)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    images = Images(torch.arange(2), pixels=pixels) if image["kind"] == "conv" else images_of(2, 3)
    left, right = encoded(matcher, images, captions_of([4, 2]))
    assert left.parts.shape[2] == right.parts.shape[2] == matcher.width
    torch.testing.assert_close(right.parts[1].norm(dim=1), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    rebuilt = SCAN(vocab_size=20, **matcher.options)
    rebuilt.load_state_dict(matcher.state_dict())
    torch.testing.assert_close(scores_of(rebuilt.eval(), images, captions_of([2])).shape, torch.Size([2, 1]))
    torch.testing.assert_close(rebuilt.score(left, right), matcher.score(left, right))


def test_it_runs_on_the_patches_of_a_hugging_face_backbone():
    vit = {
        "model_type": "vit",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 32,
        "patch_size": 16,
    }
    matcher = SCAN(vocab_size=20, image={"kind": "hf_vision", "config": vit}, text={"word_dim": 4, "width": 10})
    images = Images(torch.arange(2), pixels=torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert scores_of(matcher, images, captions_of([3, 2, 4])).shape == (2, 3)


def test_bad_input_is_named_with_its_remedy():
    matcher = SCAN(**SMALL)
    with pytest.raises(ValueError, match=r"caption rows \[1\].*no word"):
        matcher.encode_captions(captions_of([3, 0]))
    with pytest.raises(ValueError, match=r"image rows \[0\].*no region"):
        matcher.encode_images(images_of(2, 3, [0, 3]))
    with pytest.raises(ValueError, match="token id 99 in a vocabulary of 20"):
        matcher.encode_captions(Captions(torch.tensor([[99]]), torch.ones(1, 1, dtype=torch.bool), torch.arange(1)))
    with pytest.raises(ValueError, match=r"7 wide.*in_width"):
        SCAN(vocab_size=20).encode_images(images_of(1, 2))
    with pytest.raises(ValueError, match=r"data\.image=regions"):
        matcher.encode_images(Images(torch.arange(1), pixels=torch.zeros(1, 3, 8, 8, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"no agg_func='Median'; known: LogSumExp"):
        SCAN(**SMALL, agg_func="Median")


@pytest.mark.parametrize("case", list(find(GOLDEN)), ids=lambda case: case.name)
def test_the_authors_numbers_are_reproduced(case):
    line, passed = replay(case)
    assert passed, line
