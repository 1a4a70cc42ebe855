"""What a matcher says of where it looks: the weights of its own score, pair by pair, against the formulas of one pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.every_matcher import KINDS, captions_of, images_of, matcher_of

LENGTHS = [5, 3, 6]


def asked(name: str, **options: Any) -> tuple[Any, Any, Any, Tensor]:
    """Encodings of three pairs, and what the matcher says of them."""
    torch.manual_seed(3)
    matcher = matcher_of(name, **options)
    with torch.no_grad():
        images, captions = matcher.encode_images(images_of(3)), matcher.encode_captions(captions_of(LENGTHS))
        return matcher, images, captions, matcher.attention(images, captions)


def pairs_of(images: Any, captions: Any) -> list[tuple[Tensor, Tensor]]:
    return [(captions.parts[k, :n], images.parts[k]) for k, n in enumerate(LENGTHS)]


def test_scan_gives_the_softmax_over_regions_and_turned_that_over_words():
    _, images, captions, found = asked("scan", raw_feature_norm="no_norm", lambda_softmax=4.0)
    for k, (words, regions) in enumerate(pairs_of(images, captions)):
        torch.testing.assert_close(found[k, : LENGTHS[k]], (4 * words @ regions.T).softmax(1))
    _, images, captions, found = asked("scan_i2t", raw_feature_norm="no_norm", lambda_softmax=4.0)
    for k, (words, regions) in enumerate(pairs_of(images, captions)):
        torch.testing.assert_close(found[k, : LENGTHS[k]], (4 * words @ regions.T).softmax(0))
        assert not found[k, LENGTHS[k] :].any()


@pytest.mark.parametrize("name", ["sgr", "saf"])
def test_sgr_and_saf_norm_the_similarities_of_a_region_over_the_words_first(name: str):
    _, images, captions, found = asked(name)
    for k, (words, regions) in enumerate(pairs_of(images, captions)):
        raw = torch.where((s := words @ regions.T) > 0, s, 0.1 * s)
        torch.testing.assert_close(found[k, : LENGTHS[k]], (9 * raw / raw.norm(dim=0)).softmax(1))


def test_uarda_gives_nothing_to_what_does_not_pass_the_threshold():
    matcher, images, captions, found = asked("uarda", direction="t2i", eval_threshold=0.0)
    for k, (words, regions) in enumerate(pairs_of(images, captions)):
        s = words @ regions.T
        want = torch.where(s > 0, (20 * s).exp(), 0.0)
        torch.testing.assert_close(found[k, : LENGTHS[k]], want / want.sum(1, keepdim=True).clamp(min=1e-30))
    assert matcher.eval_threshold == 0.0 and bool((found == 0).any())


def test_uniter_gives_the_block_of_its_last_layer():
    matcher, images, captions, found = asked("uniter")
    with torch.no_grad():
        blocks = matcher.pairs(images, captions, torch.arange(3)).relations.blocks
    torch.testing.assert_close(found[:, 1:-1], blocks[2])
    assert not found[:, 0].any()


@pytest.mark.parametrize("name", ["vse", "dual", "clip"])
def test_vectors_attend_to_nothing(name: str):
    assert name in KINDS
    assert asked(name)[3] is None
