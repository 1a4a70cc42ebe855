from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from itm.losses.soft_label import cosine_matrix, soft_label_loss
from itm.losses.triplet import triplet_loss
from itm.matchers.dual import DualEncoder
from itm.matchers.late.scan import SCAN
from itm.matchers.late.sgraf import SAF, SGR
from itm.methods.cusa import CUSA
from itm.training.step import gradient_shares
from itm.types import Batch, Captions, Images, Matcher, SoftLabels


def batch(rows=6, teacher=True):
    ids = torch.tensor([0, 1, 2, 1, 4, 5])[:rows]
    tokens = torch.randint(4, 20, (rows, 5))
    labels = SoftLabels(torch.randn(rows, 7), torch.randn(rows, 9)) if teacher else None
    pixels = torch.randint(0, 256, (rows, 3, 64, 64), dtype=torch.uint8)
    return Batch(Images(ids, pixels=pixels), Captions(tokens, tokens > 0, ids), labels)


def region_batch(rows=4):
    b = batch(rows)
    regions = Images(b.images.image_id, regions=torch.randn(rows, 3, 10), mask=torch.ones(rows, 3, dtype=torch.bool))
    return Batch(regions, b.captions, b.teacher)


def dual(**heads):
    return DualEncoder(vocab_size=20, width=8, heads=heads).eval()


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(scores, teacher, tau, teacher_tau):
    p, y = softmax(scores / tau), softmax(teacher / teacher_tau)
    return (y * (np.log(y) - np.log(p))).sum() / len(scores)


def test_the_small_variant_is_infonce_plus_two_divergences_with_one_temperature():
    """InfoNCE + csa + usa, each the mean of two KL, student temperature shared with InfoNCE, teacher at 0.05; numpy beside torch."""
    method, b = CUSA(dual(uni=True), itc={"tau": 0.07, "reduction": "sum"}, csa=small(), usa=small()), batch()
    losses = {name: value.item() for name, value in method(b).items()}
    with torch.no_grad():
        i, c = method.matcher.encode_images(b.images), method.matcher.encode_captions(b.captions)
        s, pi, pt = (x.double().numpy() for x in (i.vector @ c.vector.T, i.uni @ i.uni.T, c.uni @ c.uni.T))
        ri, rt = (cosine_matrix(x).double().numpy() for x in (b.teacher.image, b.teacher.text))
    ids = b.images.image_id.numpy()
    y = (ids[:, None] == ids) / (ids[:, None] == ids).sum(1, keepdims=True)
    itc = -(y * (np.log(softmax(s / 0.07)) + np.log(softmax(s.T / 0.07)))).sum() / len(s) / 2
    assert losses["itc"] == pytest.approx(itc, rel=1e-5)
    assert losses["csa"] == pytest.approx((kl(s, ri, 0.07, 0.05) + kl(s.T, rt, 0.07, 0.05)) / 2, rel=1e-5)
    assert losses["usa"] == pytest.approx((kl(pi, ri, 0.07, 0.05) + kl(pt, rt, 0.07, 0.05)) / 2, rel=1e-5)
    assert [name for name, _ in method.named_parameters() if "matcher" not in name] == ["itc.tau", *frozen(method)]


def small():
    return {"weight": 1.0, "student": "itc", "teacher": 0.05}


def frozen(method):
    return [name for name, p in method.named_parameters() if "matcher" not in name and not p.requires_grad]


def test_the_defaults_are_the_shipped_setting():
    method = CUSA(dual(uni=True))
    learned = {name: p.item() for name, p in method.named_parameters() if "matcher" not in name and p.requires_grad}
    want = {
        "itc.tau": 0.05,
        "temperatures.csa_student.values.shared": 0.45,
        "temperatures.usa_student.values.image": 0.45,
        "temperatures.usa_student.values.text": 0.45,
    }
    assert learned == pytest.approx(want)
    assert frozen(method) == ["temperatures.csa_teacher.values.shared"]
    assert (method.itc.options.reduction, method.csa.weight, method.usa.weight) == ("mean", 0.1, 0.5)
    assert method.needs_teacher == ("image", "text")


@pytest.mark.parametrize("make", [SCAN, SGR, SAF])
def test_it_plugs_into_late_interaction_with_a_triplet_loss_and_its_own_uni_heads(make):
    matcher = make(vocab_size=20, image={"kind": "regions", "in_width": 10}, text={"kind": "gru", "word_dim": 6, "width": 8}, **sizes(make))
    b, method = region_batch(), CUSA(matcher, triplet={"margin": 0.2}, csa={"weight": 0.6}, usa={"weight": 0.75})
    losses = method(b)
    assert list(losses) == ["triplet", "csa", "usa"]
    torch.stack(list(losses.values())).sum().backward()
    assert isinstance(method.uni_heads["image"], nn.Linear)
    assert method.uni_heads["text"].weight.grad.abs().sum() > 0
    assert all(value.isfinite() for value in losses.values())


def sizes(make):
    return {} if make is SCAN else {"sim_dim": 6, "regions": 3}


@pytest.mark.parametrize("make", [SGR, SAF])
def test_usa_reads_the_global_vectors_that_the_score_was_made_with(make):
    towers = {"image": {"kind": "regions", "in_width": 10}, "text": {"kind": "gru", "word_dim": 6, "width": 8}}
    matcher, b = make(vocab_size=20, **towers, **sizes(make)), region_batch()
    method, seen = CUSA(matcher, triplet={}, csa=False, usa={"head": "none", "teacher": 1.0}).train(), []
    for module in (matcher.v_global_w, matcher.t_global_w):
        module.register_forward_hook(lambda module, given, vector: seen.append(vector.detach()))
    losses = method(b)
    assert len(seen) == 2, "the batch norms of the global vectors see a batch once"
    assert not matcher.kept
    taus = method.temperature("usa_student"), method.temperature("usa_teacher")
    teacher = [cosine_matrix(x) for x in (b.teacher.image, b.teacher.text)]
    want = [soft_label_loss(cosine_matrix(v), t, *tau) for v, t, tau in zip(seen, teacher, zip(*taus, strict=True), strict=True)]
    torch.testing.assert_close(losses["usa"], 0.5 * (want[0] + want[1]) / 2)


def test_the_triplet_term_is_the_plain_triplet_loss_times_its_weight():
    matcher, b = dual(), batch()
    losses = CUSA(matcher, triplet={"weight": 0.5}, csa=False, usa=False)(b, step=3)
    scores, ids = matcher.score(matcher.encode_images(b.images), matcher.encode_captions(b.captions)), b.images.image_id
    torch.testing.assert_close(losses["triplet"], 0.5 * triplet_loss(scores, ids[:, None] == ids))
    mean = CUSA(matcher, triplet={"weight": 0.5, "reduction": "mean"}, csa=False, usa=False)(b, step=3)
    torch.testing.assert_close(mean["triplet"], losses["triplet"] / len(ids))


def test_the_shares_of_the_gradient_are_those_of_each_loss_alone():
    method, b = CUSA(dual(uni=True)).double(), batch()
    losses = method(b)
    shares = gradient_shares(losses, method)
    norms = {}
    for name in losses:
        method.zero_grad()
        method(b)[name].backward()
        norms[f"share_{name}"] = torch.stack([p.grad.norm() for p in method.parameters() if p.grad is not None]).norm()
    total = sum(norms.values())
    assert {name: float(value) for name, value in shares.items()} == pytest.approx(
        {n: float(v / total) for n, v in norms.items()}, rel=1e-4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"csa": False}, "usa.teacher borrows.*csa"),
        ({"itc": False, "csa": {"student": "itc"}}, "csa.student borrows.*itc"),
        ({"itc": False, "csa": False, "usa": False}, "all switched off"),
        ({"csa": {"mode": "mul"}}, "mode"),
        ({"csa": {"wieght": 1}}, "wieght"),
        ({"csa": {"student": {"image": 0.4, "learned": True}}}, "learned"),
        ({"csa": {"teacher": "itc"}}, "csa.teacher is a number"),
        ({"usa": {"student": {"image_range": (0.0, 1.0)}}}, "above 0"),
        ({"gather": "all"}, "gather"),
    ],
)
def test_what_cannot_run_is_refused_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        CUSA(dual(uni=True), **options)


def test_usa_on_a_matcher_without_a_known_width_asks_for_it():
    class Bare(Matcher):
        kind = "bare"

    with pytest.raises(ValueError, match=r"'bare'.*usa\.width"):
        CUSA(Bare())
    assert CUSA(Bare(), usa={"width": 5, "head": "norm_linear"}).uni_heads["image"].linear.weight.shape == (5, 5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "no image teacher vectors"),
        (torch.ones(6), r"shape \(6,\)"),
        (torch.ones(6, 1), "D > 1"),
        (torch.ones(5, 4), r"want \(6, D\)"),
        (torch.cat([torch.ones(5, 4), torch.zeros(1, 4)]), r"rows \[5\] are zero"),
        (torch.full((6, 4), float("nan")), "not finite"),
    ],
)
def test_broken_teacher_vectors_are_refused_and_not_trained_on(image, message):
    b = batch()
    with pytest.raises(ValueError, match=message):
        CUSA(dual(uni=True))(Batch(b.images, b.captions, SoftLabels(image, b.teacher.text)))


def test_without_csa_and_usa_no_teacher_is_asked_for():
    method = CUSA(dual(), csa=False, usa=False)
    assert method.needs_teacher == ()
    assert list(method(batch(teacher=False))) == ["itc"]


def test_a_start_outside_the_given_clamp_is_corrected_at_the_first_pass_also_when_frozen():
    teacher = {"image": 1.51, "text": 0.02, "image_range": (0.1, 1.0), "text_range": (0.1, 1.0), "learn": False}
    method = CUSA(dual(uni=True), usa={"teacher": teacher})
    values = method.temperatures["usa_teacher"].values
    assert (values["image"].item(), values["text"].item()) == pytest.approx((1.51, 0.02))
    method(batch())
    assert (values["image"].item(), values["text"].item()) == pytest.approx((1.0, 0.1))


def test_a_start_without_a_clamp_is_kept():
    method = CUSA(dual(uni=True), csa={"teacher": 0.05})
    method(batch())
    assert method.temperature("csa_teacher")[0].item() == pytest.approx(0.05)


def test_in_the_mixed_modes_csa_has_one_temperature_whatever_is_asked():
    student = {"image": 0.2, "text": 0.6, "shared": False}
    method = CUSA(dual(uni=True), csa={"mode": "dot", "student": student})
    assert method.temperature("csa_student")[0] is method.temperature("csa_student")[1]
    assert method.temperature("csa_student")[0].item() == pytest.approx(0.4)


def test_the_loss_falls_and_the_temperatures_move_on_a_tiny_set():
    method, b = CUSA(dual(cross=True, uni=True), itc={"reduction": "sum"}).train(), batch()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    totals = []
    for step in range(25):
        total = sum(method(b, step=step).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.6 * totals[0]
    assert method.temperatures["csa_student"].values["shared"].item() != pytest.approx(0.45, abs=1e-4)
