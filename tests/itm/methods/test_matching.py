from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from itm.kinds import build_part
from itm.losses.contrastive import contrastive_loss
from itm.losses.triplet import triplet_loss
from itm.matchers.dual import cosines
from itm.methods import METHODS
from itm.methods.matching import Matching
from itm.methods.triplet import FLAT_STEPS
from itm.types import Batch, Captions, Encoded, Images, Matcher
from tests.support.every_matcher import batch_of, matcher_of


class Table(Matcher):
    """A matcher whose vectors are looked up by image id."""

    def __init__(self, rows: int = 8, width: int = 4) -> None:
        super().__init__()
        self.image, self.text = nn.Embedding(rows, width), nn.Embedding(rows, width)

    def encode_images(self, images: Images) -> Encoded:
        return Encoded(vector=nn.functional.normalize(self.image(images.image_id)))

    def encode_captions(self, captions: Captions) -> Encoded:
        return Encoded(vector=nn.functional.normalize(self.text(captions.tokens[:, 0])))

    def score(self, images: Encoded, captions: Encoded) -> torch.Tensor:
        return cosines(images, captions)


def batch(ids=(0, 1, 2, 1, 4)):
    ids = torch.tensor(ids)
    tokens = torch.arange(len(ids))[:, None]
    return Batch(Images(ids), Captions(tokens, tokens >= 0, ids))


def scores_of(matcher, b):
    return matcher.score(matcher.encode_images(b.images), matcher.encode_captions(b.captions))


def test_the_contrastive_loss_counts_captions_of_the_same_image_as_positives():
    matcher, b = Table(), batch()
    ids = b.images.image_id
    want = contrastive_loss(scores_of(matcher, b), 0.07, ids[:, None] == ids, reduction="sum")
    got = build_part(METHODS, "matching", {"tau": 0.07}, "method", matcher=matcher)(b)
    assert list(got) == ["contrastive"]
    torch.testing.assert_close(got["contrastive"], want)


def test_hardest_negatives_start_after_the_warm_up():
    matcher, b = Table(), batch()
    method, ids = Matching(matcher, loss="triplet", margin=0.3, warmup_steps=5), b.images.image_id
    for step, hardest in ((4, False), (5, True)):
        torch.testing.assert_close(
            method(b, step=step)["triplet"], triplet_loss(scores_of(matcher, b), ids[:, None] == ids, margin=0.3, hardest=hardest)
        )


def train(matcher: Matcher, lr: float, steps: int) -> list[float]:
    method = Matching(matcher, loss="triplet").train()
    optimiser, losses = torch.optim.Adam(method.parameters(), lr=lr), []
    for step in range(steps):
        loss = method(batch_of(6), step=step)["triplet"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_a_training_that_collapses_is_reported_once_with_a_remedy():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        losses = train(matcher_of("sgr"), 0.3, 3 * FLAT_STEPS)
    assert losses[-1] == pytest.approx(2 * 0.2 * 6, rel=1e-3)
    assert [str(w.message).endswith("warmup_steps (all negatives first) or a smaller train.lr.") for w in seen] == [True]


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_side_that_has_become_constant_is_reported(side: str):
    matcher = Table()
    nn.init.ones_(getattr(matcher, side).weight)
    method = Matching(matcher, loss="triplet")
    for step in range(FLAT_STEPS - 1):
        method(batch(), step=step)
    with pytest.warns(UserWarning, match="warmup_steps"):
        method(batch(), step=FLAT_STEPS - 1)


def test_a_healthy_model_is_not_reported():
    method = Matching(Table(), loss="triplet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2 * FLAT_STEPS):
            method(batch(), step=step)


def test_the_temperature_is_clamped_at_the_start_of_the_next_pass():
    method = Matching(Table(), tau=0.05, tau_range=(0.04, 0.06))
    with torch.no_grad():
        method.term.tau.fill_(0.9)
    method(batch())
    assert method.term.tau.item() == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "tripled"}, "tripled"),
        ({"margin": 0.2}, "margin"),
        ({"loss": "triplet", "hardness": 1}, "hardest"),
        ({"tau": 0.0}, "above 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Matching(Table(), **options)


@pytest.mark.parametrize("options", [{}, {"loss": "triplet", "margin": 0.4}])
def test_the_loss_falls_on_a_tiny_set(options):
    method, b = Matching(Table(), **options), batch()
    optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
    losses = []
    for step in range(60):
        loss = sum(method(b, step=step).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
