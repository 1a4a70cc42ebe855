"""Teacher against student on a batch small enough to count by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from itm.report.soft_labels import Compared, alike, histograms, row_of, soft_labels_of

TEACHER = torch.tensor([[1.0, 0.98, 0.2, 0.1], [0.98, 1.0, 0.3, 0.0], [0.2, 0.3, 1.0, 0.5], [0.1, 0.0, 0.5, 1.0]])
SCORES = torch.tensor([[0.9, 0.3, 0.2, 0.1], [0.95, 0.8, 0.0, 0.1], [0.1, 0.2, 0.7, 0.0], [0.0, 0.1, 0.2, 0.6]])  # images in rows


def compared() -> Compared:
    names = list("abcd")
    return Compared(
        keys=names,
        shards=["s"] * 4,
        captions=[f"{name}-0" for name in names],
        texts=[f"text {name}" for name in names],
        scores=SCORES,
        student_image=TEACHER**3,
        student_text=None,
        teacher_image=TEACHER,
        teacher_text=TEACHER,
        targets=(TEACHER, TEACHER),
        teacher_taus=(0.1, 0.05),
        student_taus=(0.1, 0.2),
    )


def test_a_row_is_the_softmax_of_teacher_and_student_over_the_images_of_the_batch():
    row = row_of(compared())
    # Captions a and b share their mass between two images; the most spread row is b's: exp(.98/.05) against exp(1/.05), and exp(.3/.05).
    weights = {name: math.exp(value / 0.05) for name, value in zip("abcd", TEACHER[1].tolist(), strict=True)}
    asked = {name: math.exp(score / 0.2) for name, score in zip("abcd", SCORES[:, 1].tolist(), strict=True)}
    assert (row["caption"], row["text"]) == ("b-0", "text b")
    assert [image["image"] for image in row["images"]] == ["b", "a", "c", "d"]
    for image in row["images"]:
        assert image["target"] == pytest.approx(weights[image["image"]] / sum(weights.values()), abs=1e-6)
        assert image["student"] == pytest.approx(asked[image["image"]] / sum(asked.values()), abs=1e-6)
    assert [image["own"] for image in row["images"]] == [True, False, False, False]
    assert row["rest"]["target"] == pytest.approx(0, abs=1e-6) and row["flat"] == pytest.approx(math.log(4))


def test_false_negatives_are_pairs_with_half_the_weight_of_the_captions_own():
    found = alike(compared())
    # exp(-.02/.05) = .67 of the own weight; the next, exp(-.5/.05), is far below a half.
    assert (found["count"], found["negatives"]) == (2, 12)
    (pair,) = found["pairs"]  # one of the two directions stands for both
    assert {pair["own_image"], pair["image"]} == {"a", "b"}
    assert pair["weight"] == pytest.approx(math.exp(-0.02 / 0.05), abs=1e-5)
    assert pair["student_rank"] == {"a-0": 1, "b-0": 2}[pair["caption"]]  # image b stands above a's own image, image a below b's
    flat = alike(replace(compared(), teacher_taus=(1.0, 1.0)))
    assert flat["count"] == sum(math.exp(value - 1) >= 0.5 for row in TEACHER.tolist() for value in row) - 4


def test_histograms_count_pairs_of_different_samples_on_one_scale_and_leave_out_a_side_without_vectors():
    found = histograms(compared())
    assert list(found) == ["image", "across"]
    image = found["image"]
    assert image["edges"][0] == 0.0 and image["edges"][-1] == pytest.approx(0.98)
    width = 0.98 / 40
    for name, values in (("teacher", TEACHER), ("student", TEACHER**3)):
        wanted = [0.0] * 40
        for i in range(4):
            for j in range(4):
                if i != j:
                    wanted[min(int(float(values[i, j]) / width), 39)] += 1 / 12
        assert image[name] == pytest.approx(wanted, abs=1e-6)
    assert image["rank_correlation"] == pytest.approx(1.0)


def test_all_of_it_is_told_with_the_size_of_the_batch():
    assert set(soft_labels_of(compared())) == {"pairs", "histograms", "row", "alike"}
    assert soft_labels_of(compared())["pairs"] == 4
