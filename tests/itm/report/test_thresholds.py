"""Cut words, the maxima that a threshold parts and the Gaussians of a training, against loops and the rows they come from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from itm.evaluation.scoring import encode_rows
from itm.report.pair import explained, find_pair
from itm.report.pictures import density
from itm.report.thresholds import fits_of, maxima_of
from tests.support.pair_world import matcher_of, split

CPU = torch.device("cpu")


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_a_word_is_cut_where_no_region_is_more_similar_than_the_threshold_and_then_does_not_count(tmp_path: Path, direction: str):
    rows = split(tmp_path / "test")
    matcher: Any = matcher_of("uarda", rows, direction=direction)
    pair = find_pair(str(tmp_path / "test"), rows[1].key)
    best = explained(matcher, pair, CPU)["cut"]["best"]
    t = sorted(best)[3] + 1e-6  # four of the words lie below
    matcher.thresholds[direction].t.fill_(t)
    told = explained(matcher, pair, CPU)["cut"]
    with torch.no_grad():
        image = matcher.encode_images(matcher.inputs.images([pair.image.regions]))
        caption = matcher.encode_captions(matcher.inputs.captions([pair.caption.text]))
        wanted = [max(float(word @ region) for region in image.parts[0][image.mask[0]]) for word in caption.parts[0][1:-1]]
        weights = matcher.attention(image, caption)[0, 1:-1]
    assert told["words"] == pair.caption.text.split()
    assert told["best"] == pytest.approx(wanted, abs=2e-6)
    assert told["directions"][direction] == {"t": pytest.approx(t), "cut": [value <= t for value in wanted]}
    assert (weights.sum(1) == 0).tolist() == told["directions"][direction]["cut"] and sum(told["directions"][direction]["cut"]) == 4


@torch.no_grad()
def test_maxima_are_those_of_captions_whose_own_image_scores_best(tmp_path: Path):
    rows = split(tmp_path / "test", count=8)
    matcher: Any = matcher_of("uarda", rows)
    raw = [row.regions.to_npz() for row in rows if row.regions is not None]
    images = encode_rows(matcher, matcher.inputs.images(raw))
    captions = encode_rows(matcher, matcher.inputs.captions([row.captions[0].text for row in rows]))
    own = torch.eye(8, dtype=torch.bool)
    scores = own * 1.0
    scores[0, 1] = 2.0  # caption 1 finds image 0: it is no sample
    found = maxima_of(matcher, images, captions, own, scores)["t2i"]
    assert images.parts is not None and captions.parts is not None and images.mask is not None and captions.mask is not None
    matched = []
    for row in (0, 2, 3, 4, 5, 6, 7):
        regions = images.parts[row][images.mask[row]]
        matched += [max(float(word @ region) for region in regions) for word in captions.parts[row][captions.mask[row]]]
    assert found["fragments"] == len(matched)
    assert found["matched_mean"] == pytest.approx(sum(matched) / len(matched), abs=1e-6)
    width = found["edges"][1] - found["edges"][0]
    for name in ("matched", "mismatched"):
        assert sum(found[name]) * width == pytest.approx(1, abs=1e-4)
    assert found["state"] == dict.fromkeys(("t", "t_safe", "mu_pos", "sigma_pos", "mu_neg", "sigma_neg"), 0.0)


def logged(step: int) -> dict[str, float]:
    names = ("t", "t_safe", "mu_pos", "sigma_pos", "mu_neg", "sigma_neg")
    values = (0.1, 0.05, step / 100, 0.1 * (step > 10), 0.0, 0.2)
    return {"step": step, "loss": 1.0} | {f"matcher.thresholds.t2i.{name}": value for name, value in zip(names, values, strict=True)}


def test_fits_are_the_last_rows_of_epochs_that_have_one_evenly_spread():
    losses = [logged(step) for step in range(10, 210, 10)]
    (fits,) = fits_of(losses, steps_per_epoch=25).values()
    assert [row["epoch"] for row in fits] == [1, 2, 4, 5, 7, 8]
    assert [row["step"] for row in fits] == [20, 50, 100, 120, 170, 200]
    assert fits[1] == {"step": 50, "epoch": 2, "t": 0.1, "t_safe": 0.05, "mu_pos": 0.5, "sigma_pos": 0.1, "mu_neg": 0.0, "sigma_neg": 0.2}
    (unknown,) = fits_of(losses, steps_per_epoch=None).values()
    assert "epoch" not in unknown[0] and unknown[-1]["step"] == 200 and len(unknown) == 6
    assert fits_of([{"step": 1, "loss": 2.0}], 25) == {}


def test_the_density_is_the_normal_one():
    assert density(1.5, 1.0, 0.5) == pytest.approx(math.exp(-0.5) / (0.5 * math.sqrt(2 * math.pi)))
