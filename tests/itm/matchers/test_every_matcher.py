"""What must hold for every kind of matcher: it trains under every method it composes with, and a score depends on its pair alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from itm.config import Train
from itm.kinds import build_part, find_part
from itm.matchers import MATCHERS
from itm.methods import METHODS
from itm.training.optim import build_optimizer
from itm.training.step import Step
from itm.types import Captions, Images
from tests.support.every_matcher import KINDS, POSITIONS, REGIONS, WORDS, batch_of, captions_of, images_of, matcher_of, scores_of

HALF_STEPS = {"rank_image", "rank_text", "iais_image", "iais_text"}
LATE = {"triplet", "iais_image", "iais_text"}
SLOTS = ("sgr", "saf")  # batch norm over the region slot: the number of slots is part of the model


@pytest.mark.parametrize("ranking", ["itc", "triplet"])
@pytest.mark.parametrize("name", KINDS)
def test_cusa_trains_every_matcher(name: str, ranking: str):
    losses = train(name, "cusa", {ranking: True})
    assert set(losses) == {ranking, "csa", "usa"}


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("clip", "dual", "vse")])
def test_iais_trains_every_matcher_with_words_and_regions_in_one_space(name: str):
    losses = train(name, "iais", {"schedule": "constant", "ranking": {"hard_negatives": 2}})
    assert set(losses) == (HALF_STEPS if name == "uniter" else LATE)


def train(name: str, kind: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Three real steps: every loss finite, every trainable weight with a gradient (DDP waits for each) and moved."""
    method = build_part(METHODS, kind, options, "method", matcher=matcher_of(name))
    before = {key: p.detach().clone() for key, p in method.named_parameters() if p.requires_grad}
    settings = Train(lr=1e-3, schedule="constant")
    step = Step(method, build_optimizer(method, settings), settings, lambda _: 1e-3, None, seed=0)
    batch = batch_of(6)
    for number in range(3):
        losses = step([batch], number)
        assert all(torch.isfinite(value) for value in losses.values()), losses
    without = [key for key, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert any(not torch.equal(p, before[key]) for key, p in method.named_parameters() if key in before)
    if name == "uarda":
        assert all(int(state.updates) == 3 for state in method.matcher.thresholds.values())
    return {key: value for key, value in losses.items() if key not in ("loss", "separation")}


@pytest.mark.parametrize("kind", ["scan", "uarda", "uniter", "sgr"])
def test_an_unknown_option_is_refused_with_the_near_one_from_a_recipe_and_in_code(kind: str):
    asked = {"scan": "lambda_lsee", "uarda": "directions", "uniter": "hiden", "sgr": "sim_dimm"}[kind]
    with pytest.raises(ValueError, match=rf"model '{kind}' has no option '{asked}'; did you mean '\w+'\?"):
        build_part(MATCHERS, kind, {asked: 1}, "model", vocab_size=WORDS)
    if kind != "sgr":  # its options are plain keyword arguments, which Python checks
        with pytest.raises(ValueError, match=rf"{kind.upper()} has no option '{asked}'; did you mean"):
            find_part(MATCHERS, kind, "model")(vocab_size=WORDS, **{asked: 1})


@pytest.mark.parametrize("name", KINDS)
def test_padding_changes_no_score(name: str):
    matcher, images, captions = matcher_of(name), images_of(3), captions_of([5, 3, 7, 4])
    want = scores_of(matcher, images, captions)
    longer = Captions(F.pad(captions.tokens, (0, 3)), F.pad(captions.mask, (0, 3)), captions.image_id)
    torch.testing.assert_close(scores_of(matcher, images, longer), want, atol=1e-5, rtol=1e-5)
    if name in SLOTS:
        return
    assert images.regions is not None and images.boxes is not None and images.mask is not None
    regions, boxes = F.pad(images.regions, (0, 0, 0, 2), value=9.0), F.pad(images.boxes, (0, 0, 0, 2))
    wider = Images(images.image_id, images.pixels, regions, boxes, F.pad(images.mask, (0, 2)))
    torch.testing.assert_close(scores_of(matcher, wider, captions), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_score_does_not_depend_on_its_block(name: str):
    matcher, images, captions = matcher_of(name), images_of(5), captions_of([5, 3, 7, 4])
    want = scores_of(matcher, images, captions)
    for size in (1, 2):
        blocks = [
            torch.cat([scores_of(matcher, images[i : i + size], captions[t : t + size]) for t in range(0, 4, size)], 1)
            for i in range(0, 5, size)
        ]
        torch.testing.assert_close(torch.cat(blocks), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_permuted_rows_give_permuted_scores(name: str):
    matcher, images, captions = matcher_of(name), images_of(5), captions_of([5, 3, 7, 4])
    rows, columns = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 3, 0, 1])
    want = scores_of(matcher, images, captions)[rows][:, columns]
    torch.testing.assert_close(scores_of(matcher, images[rows], captions[columns]), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in SLOTS])
def test_one_image_with_one_region_and_one_word_has_a_score(name: str):
    matcher = matcher_of(name)
    assert bool(torch.isfinite(scores_of(matcher, images_of(1, regions=1), captions_of([1]))).all())


@pytest.mark.parametrize("name", KINDS)
def test_a_caption_without_a_token_is_refused(name: str):
    captions = captions_of([5, 3])
    captions.mask[1] = False
    with pytest.raises(ValueError, match=r"(?s)tokenizer must add"):
        matcher_of(name).encode_captions(captions)


@pytest.mark.parametrize("name", KINDS)
def test_a_token_outside_the_vocabulary_is_refused(name: str):
    captions = captions_of([5, 3])
    captions.tokens[0, 2] = WORDS
    with pytest.raises(ValueError, match=r"token id 30.*vocabulary"):
        matcher_of(name).encode_captions(captions)


@pytest.mark.parametrize("name", ["clip", "uniter"])
def test_more_tokens_than_positions_are_refused(name: str):
    with pytest.raises(ValueError, match=rf"set text\.max_length={POSITIONS}"):
        matcher_of(name).encode_captions(captions_of([POSITIONS + 1, 3]))


@pytest.mark.parametrize("name", SLOTS)
def test_another_number_of_regions_than_slots_and_one_image_in_training_are_refused(name: str):
    matcher = matcher_of(name)
    with pytest.raises(ValueError, match=r"regions"):
        matcher.encode_images(images_of(2, regions=REGIONS + 1))
    matcher.train()
    with pytest.raises(ValueError, match=r"raise train\.batch_size"):
        matcher.score(matcher.encode_images(images_of(1)), matcher.encode_captions(captions_of([4])))
