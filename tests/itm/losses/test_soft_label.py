from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from itm.losses.soft_label import cosine_matrix, mixed_similarity, soft_label_loss


def test_kl_is_target_against_student_averaged_over_rows():
    scores, teacher = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    want = kl_divergence(Categorical(logits=teacher / 0.7), Categorical(logits=scores / 0.3)).mean()
    torch.testing.assert_close(soft_label_loss(scores, teacher, 0.3, 0.7), want)


def test_cross_entropy_is_kl_plus_the_entropy_of_the_target():
    scores, teacher = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    kl, entropy = soft_label_loss(scores, teacher, 0.3, 0.7), Categorical(logits=teacher / 0.7).entropy().mean()
    summed = soft_label_loss(scores, teacher, 0.3, 0.7, loss="contrastive", reduction="sum")
    torch.testing.assert_close(summed, kl + entropy)
    torch.testing.assert_close(soft_label_loss(scores, teacher, 0.3, 0.7, loss="contrastive", reduction="mean"), summed / 5)


def test_the_loss_vanishes_where_student_and_teacher_agree():
    same = torch.randn(4, 4)
    assert soft_label_loss(same, same, 0.5, 0.5).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", ["kl", "contrastive"])
def test_gradients_reach_scores_and_both_temperatures(loss):
    leaves = [torch.randn(3, 3, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)]
    teacher = torch.randn(3, 3, dtype=torch.float64)
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t, s: soft_label_loss(x, teacher, t, s, loss=loss), leaves)


def test_an_extreme_teacher_temperature_gives_no_nan():
    scores = torch.randn(3, 3, requires_grad=True)
    loss = soft_label_loss(scores, torch.eye(3) * 1000, 0.01, 0.01)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


def test_the_three_modes_mix_the_teachers_as_written():
    image, text = torch.tensor([[1.0, -0.2], [0.5, 1.0]]), torch.tensor([[1.0, 0.8], [0.32, 1.0]])
    assert mixed_similarity(image, text, "each") == (image, text)
    torch.testing.assert_close(mixed_similarity(image, text, "add")[0], torch.tensor([[1.0, 0.3], [0.41, 1.0]]))
    torch.testing.assert_close(mixed_similarity(image, text, "dot")[1], torch.tensor([[1.0, 0.0], [0.4, 1.0]]))


def test_cosines_stay_in_single_precision_under_autocast():
    vectors = torch.randn(4, 9).half()
    with torch.autocast("cpu", torch.bfloat16):
        got = cosine_matrix(vectors)
    unit = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(got.double(), unit @ unit.T, atol=1e-6, rtol=0)
