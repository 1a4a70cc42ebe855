"""The page on real photos is made from its JSON file, and that holds no photo."""

from __future__ import annotations

import json

import pytest
import torch

from itm.losses.contrastive import contrastive_loss
from itm.losses.soft_label import cosine_matrix, soft_label_loss
from tests.support.study import RESULT, page_of, picture_of
from tests.support.study_loop import Setting, Student, Vectors, loss_of, teacher_of


def test_the_page_is_what_the_finished_runs_say() -> None:
    assert RESULT.with_suffix(".md").read_text(encoding="utf-8") == page_of(RESULT)
    assert RESULT.with_suffix(".svg").read_text(encoding="utf-8") == picture_of(RESULT)


def test_every_run_has_its_chance_beside_it() -> None:
    said = json.loads(RESULT.read_text(encoding="utf-8"))
    assert {metric for run in said["runs"] for metric in run["metrics"]} == said["chance"].keys()
    assert all(run["metrics"]["rsum"] > said["chance"]["rsum"] for run in said["runs"])


@pytest.mark.parametrize("student", [None, 0.45])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_plain_loop_has_the_gradient_of_the_losses_of_the_pipeline(student: float | None, shuffled: bool) -> None:
    torch.manual_seed(0)
    held = Vectors(torch.randn(6, 9), torch.randn(14, 5), torch.arange(6).repeat_interleave(torch.tensor([2, 3, 2, 2, 4, 1])))
    model = Student(Setting(student=student, csa=0.7, usa=1.3, shuffled=shuffled), (9, 5))
    rows = torch.tensor([0, 3, 4, 8, 13])
    teacher = [side[rows] for side in teacher_of(held, shuffled)]
    plain = torch.autograd.grad(loss_of(model, held, rows, teacher), list(model.parameters()), allow_unused=True)

    owner = held.owner[rows]
    images, texts = model(held.images[owner], held.texts[rows])
    scores, cosines = images @ texts.T, [cosine_matrix(side) for side in teacher]
    csa, usa_image, usa_text = model.temperatures()
    loss = contrastive_loss(scores, model.tau, owner[:, None] == owner[None, :], reduction="sum")
    students = ((0.7, scores, csa), (0.7, scores.T, csa), (1.3, images @ images.T, usa_image), (1.3, texts @ texts.T, usa_text))
    for (weight, side, tau), labels in zip(students, cosines * 2, strict=True):
        loss = loss + weight * soft_label_loss(side, labels, tau, 0.2) / 2
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for one, other in zip(plain, ours, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


def test_the_plain_loop_hands_each_caption_the_vectors_of_another_photo() -> None:
    held = Vectors(
        torch.eye(4, 4) + 1, torch.arange(8.0)[:, None] @ torch.ones(1, 3) + torch.eye(8, 3), torch.arange(4).repeat_interleave(2)
    )
    true, shuffled = teacher_of(held, False), teacher_of(held, True)
    for side, control in zip(true, shuffled, strict=True):
        assert sorted(control.tolist()) == sorted(side.tolist())
    assert not any(torch.equal(a, b) for a, b in zip(true[0], shuffled[0], strict=True))
