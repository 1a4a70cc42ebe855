"""Probabilities of a true match: stated and seen error agree where no cutoff of the score could, and a search can find nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from itm.data.formats import NewerFormat
from itm.evaluation.dataset import EncodedSplit, names_of
from itm.retrieval.calibration import Calibration, Curve, calibrate, features, load_calibration, logistic, wilson, write_calibration
from itm.retrieval.engine import Engine, Question
from itm.retrieval.index import Index
from itm.types import Encoded, Matcher
from tests.support.disc_index import write_discs
from tests.support.registry_world import tiny_matcher

IMAGES, CAPTIONS, WIDTH = 600, 4, 24


class Moody(Matcher):
    """A dual encoder whose scores are scaled and shifted by the last two numbers of a row, as scores of real questions are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def score(self, images: Encoded, captions: Encoded) -> Tensor:
        assert images.vector is not None and captions.vector is not None
        told = images.vector[:, :-2] @ captions.vector[:, :-2].T
        (scale, shift), (other, more) = images.vector[:, -2:].T[:, :, None], captions.vector[:, -2:].T[:, None]
        return told * scale * other + shift + more


def world(seed: int, moody: str = "captions") -> EncodedSplit:
    """Captions that are some clearly, some hardly, those of their image; the rows of the side `moody` have moods."""
    draw = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(IMAGES, WIDTH, generator=draw), dim=1)
    noise = 0.1 + 0.35 * torch.rand(IMAGES * CAPTIONS, 1, generator=draw)
    captions = F.normalize(images.repeat_interleave(CAPTIONS, 0) + noise * torch.randn(IMAGES * CAPTIONS, WIDTH, generator=draw), dim=1)
    sides = []
    for name, rows in (("images", images), ("captions", captions)):
        usual = torch.tensor([[1.0, 0.0]]).expand(len(rows), 2)
        mood = torch.stack([0.3 + 3 * torch.rand(len(rows), generator=draw), 4 * torch.rand(len(rows), generator=draw)], 1)
        sides.append(Encoded(vector=torch.cat([rows, mood if name == moody else usual], 1)))
    names = names_of(IMAGES, torch.arange(IMAGES).repeat_interleave(CAPTIONS))
    return EncodedSplit(*sides, names)


@pytest.fixture(scope="module")
def told() -> Calibration:
    """Of both directions, each of questions with moods."""
    one, other = calibrate(Moody(), world(0), "moody"), calibrate(Moody(), world(0, "images"), "moody")
    return replace(one, curves={"images": one.curves["images"], "captions": other.curves["captions"]})


def asked_anew(told: Calibration) -> tuple[Tensor, Tensor, Tensor]:
    """Of questions in new worlds, every second of which has lost its image: probability of the best answer, its score, if it is right."""
    likely, best, right = [], [], []
    for seed in range(1, 4):
        split = world(seed)
        scores = Moody().score(split.images, split.captions).detach().T
        owner = split.names.caption_image
        for number in range(seed % CAPTIONS, len(scores), CAPTIONS):
            left = torch.ones(IMAGES, dtype=torch.bool)
            left[owner[number]] = number % 2 == 0
            own, rows = scores[number][left], left.nonzero()[:, 0]
            values, places = own.topk(5)
            likely.append(told(values, own, "images")[0])
            best.append(values[0])
            right.append(rows[places[0]] == owner[number])
    return torch.stack(likely), torch.stack(best), torch.stack(right)


def separation(values: Tensor, right: Tensor) -> float:
    """The chance that a right answer stands above a wrong one."""
    yes, no = values[right], values[~right]
    return float((yes[:, None] > no[None]).float().mean())


def test_stated_and_seen_error_agree_on_questions_held_out(told: Calibration):
    for find, questions in (("images", IMAGES * CAPTIONS), ("captions", IMAGES)):
        rows = told.curves[find].checked
        assert rows[0].n == questions
        assert rows[0].seen > 0.4, "half of the questions had lost their match"
        for row in rows:
            assert row.n >= 50
            assert abs(row.stated - row.seen) <= 0.05, (find, row)
            assert row.low <= row.seen <= row.high
    assert "stated error" in str(told) and "95 %" in str(told)


def test_the_curve_holds_for_another_world_where_a_flat_cutoff_says_nothing(told: Calibration):
    likely, best, right = asked_anew(told)
    for least in (0.0, 0.5, 0.8):
        kept = likely >= least
        assert kept.sum() >= 100
        assert float((1 - likely[kept]).mean()) == pytest.approx(float(1 - right[kept].float().mean()), abs=0.05)
    assert separation(likely, right) > 0.85
    assert separation(best, right) < 0.65


def test_an_answer_that_stands_as_high_in_a_larger_index_is_less_sure(told: Calibration):
    scores, background = torch.tensor([4.0, 2.5, 2.4]), torch.linspace(-2, 2, 200)
    sure = [float(replace(told, sizes={"images": size})(scores, background, "images")[0]) for size in (100, 1_000, 1_000_000)]
    assert sure == sorted(sure, reverse=True) and sure[0] > sure[2]
    with pytest.raises(ValueError, match="only images are calibrated"):
        replace(told, curves={"images": told.curves["images"]})(scores, background, "captions")


def test_the_weights_are_where_the_likelihood_is_flat():
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(500, 3, generator=draw, dtype=torch.float64)
    labels = (torch.sigmoid(rows @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)) > torch.rand(500, generator=draw)).double()
    weights = logistic(rows, labels).requires_grad_()
    (F.binary_cross_entropy_with_logits(rows @ weights, labels, reduction="sum")).backward()
    assert weights.grad is not None and weights.grad.abs().max() < 0.05
    assert torch.sign(weights).tolist() == [1, -1, 1]


def test_the_interval_is_that_of_wilson():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 100) == pytest.approx((0.0, 0.0370), abs=1e-4)


def test_features_do_not_change_with_the_scale_of_a_matcher():
    scores, background = torch.rand(4, 5).sort(dim=1, descending=True).values.double(), torch.rand(4, 50).double()
    assert torch.allclose(features(scores, background, 50), features(7 * scores - 3, 7 * background - 3, 50))


def test_the_engine_says_probabilities_and_leaves_out_what_is_less_likely(tmp_path: Path):
    matcher = tiny_matcher(2)
    index = Index.of_shards(matcher, write_discs(tmp_path / "test"))
    curve = Curve((0.0, -0.5, 1.0, 0.2, 0.2), 6, 100)
    engine = Engine(matcher, index, "cpu", calibration=Calibration("x", {"images": curve}).sized(index))
    every = engine.answer([Question(text="a red circle", k=6)])[0].hits
    likely = [hit.probability for hit in every]
    assert all(p is not None and 0 < p < 1 for p in likely)
    assert engine.answer([Question(text="a red circle", k=1)])[0].hits[0] == every[0], "how far it leads does not depend on k"
    assert engine.answer([Question(text="a red circle", k=2, offset=2)])[0].hits == every[2:4]
    least = sorted(p for p in likely if p is not None)[2]
    kept = engine.answer([Question(text="a red circle", k=6, min_score=least)])[0].hits
    assert kept == [hit for hit in every if hit.probability is not None and hit.probability >= least]
    assert engine.answer([Question(text="a red circle", k=6, min_score=1.0)])[0].hits == []
    alike = engine.answer([Question(text="a red circle", find="captions")])[0].hits
    assert [hit.probability for hit in alike] == [None] * 5
    with pytest.raises(ValueError, match="across modalities only"):
        engine.answer([Question(text="a red circle", find="captions", min_score=0.5)])


def test_a_calibration_lies_beside_its_index_and_belongs_to_one_matcher(told: Calibration, tmp_path: Path):
    matcher = tiny_matcher(2)
    index = Index.of_shards(matcher, write_discs(tmp_path / "test"))
    folder = str(tmp_path / "index")
    assert load_calibration(folder, index) is None
    uri = Path(write_calibration(folder, replace(told, matcher=index.identity.matcher)))
    read = load_calibration(folder, index)
    assert read is not None and read.curves == told.curves and read.sizes == {"images": 6, "captions": 12}
    assert load_calibration(folder, Index.of_shards(tiny_matcher(3), str(tmp_path / "test"))) is None
    said = json.loads(uri.read_text())
    uri.write_text(json.dumps(said | {"format": 99}))
    with pytest.raises(NewerFormat):
        load_calibration(folder, index)
    said["curves"]["images"]["weights"] = [1.0, float("nan")]
    uri.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="delete it and calibrate again"):
        load_calibration(folder, index)


def test_too_few_images_are_refused():
    split = world(0)
    few = EncodedSplit(split.images[:10], split.captions[:30], names_of(10, torch.arange(10).repeat_interleave(3)))
    with pytest.raises(ValueError, match="10 images are too few"):
        calibrate(Moody(), few, "moody")
