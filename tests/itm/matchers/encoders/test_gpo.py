"""Generalised pooling against loops over the equations of its paper (arXiv 2011.04305, section 4), and in a dual encoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from itm.matchers.dual import DualEncoder
from itm.matchers.encoders.gpo import GPO
from tests.support.every_matcher import captions_of, images_of

OPTIONS = {
    "image": {"kind": "regions", "in_width": 6, "width": 10},
    "text": {"kind": "gru", "word_dim": 6, "width": 10},
    "width": 8,
    "pooling": {"image": {"kind": "gpo", "hidden": 5}, "text": {"kind": "gpo", "positions": 8}},
}


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def gru(codes: list[Tensor], weights: dict[str, Tensor], suffix: str) -> list[Tensor]:
    """One direction, gate by gate."""
    inside, hidden, bias_in, bias_hidden = (weights[f"gru.{name}_l0{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    state, states = torch.zeros(hidden.shape[1]), []
    for code in codes:
        ri, zi, ni = (inside @ code + bias_in).chunk(3)
        rh, zh, nh = (hidden @ state + bias_hidden).chunk(3)
        update = sigmoid(zi + zh)
        state = (1 - update) * torch.tanh(ni + sigmoid(ri + rh) * nh) + update * state
        states.append(state)
    return states


def plain_gpo(values: Tensor, pool: GPO) -> Tensor:
    """v_d = sum_k theta_k max_k(values_d) over the real parts (K,D); theta from a bidirectional GRU over the positions."""
    weights, count = pool.state_dict(), len(values)
    codes = []
    for place in range(count):
        code = []
        for j in range(pool.positions // 2):
            angle = place / 10000 ** (2 * j / pool.positions)
            code += [math.sin(angle), math.cos(angle)]
        codes.append(torch.tensor(code))
    ahead, back = gru(codes, weights, ""), gru(codes[::-1], weights, "_reverse")[::-1]
    answers = [float(weights["linear.weight"][0] @ ((a + b) / 2)) / pool.temperature for a, b in zip(ahead, back, strict=True)]
    total = sum(math.exp(a - max(answers)) for a in answers)
    theta = [math.exp(a - max(answers)) / total for a in answers]
    pooled = [sum(t * v for t, v in zip(theta, sorted(values[:, d].tolist(), reverse=True), strict=True)) for d in range(values.shape[1])]
    return torch.tensor(pooled)


@torch.no_grad()
def test_every_row_is_the_sum_of_its_sorted_values_by_learned_weights():
    pool, parts = GPO(positions=6, hidden=4), torch.randn(5, 7, 3)
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 4, 2])[:, None]
    mask[3] = mask[3].roll(2)  # real parts need not come first
    got = pool(parts, mask)
    for row in range(5):
        torch.testing.assert_close(got[row], plain_gpo(parts[row][mask[row]], pool), atol=1e-5, rtol=1e-5)


def test_neither_order_nor_padding_nor_company_counts_and_gradients_are_finite():
    pool, parts, mask = GPO(), torch.randn(3, 6, 4, requires_grad=True), torch.arange(6) < torch.tensor([6, 3, 1])[:, None]
    got = pool(parts, mask)
    torch.testing.assert_close(pool(parts[1:2, [2, 0, 1]], mask[1:2, :3]), got[1:2])
    got.square().sum().backward()
    grads = [parts.grad, *(p.grad for p in pool.parameters())]
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in grads)
    assert not bool(parts.grad[~mask].any())


def test_equal_answers_make_the_mean_and_an_eager_first_rank_the_maximum():
    pool, parts, mask = GPO(), torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    torch.nn.init.zeros_(pool.linear.weight)
    torch.testing.assert_close(pool(parts, mask), parts.mean(1))
    one = torch.zeros(2, 5).index_fill(1, torch.tensor([0]), 1.0)
    pool.weights = lambda counts, longest: one  # type: ignore[method-assign]
    torch.testing.assert_close(pool(parts, mask), parts.amax(1))


@torch.no_grad()
def test_a_dual_encoder_pools_its_projected_parts_and_its_options_rebuild_it():
    model, images, captions = DualEncoder(vocab_size=30, **OPTIONS).eval(), images_of(3), captions_of([5, 3])
    for encoder, linear, pool, rows, encode in (
        (model.image_encoder, model.image_linear, model.image_pooling, images, model.encode_images),
        (model.text_encoder, model.text_linear, model.text_pooling, captions, model.encode_captions),
    ):
        seen = encoder(rows)
        for row in range(len(rows)):
            vector = plain_gpo(linear(seen.parts[row][seen.mask[row]]), pool)
            torch.testing.assert_close(encode(rows).vector[row], vector / vector.norm(), atol=1e-5, rtol=1e-5)
    again = DualEncoder(vocab_size=30, **model.options).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.encode_captions(captions).vector, model.encode_captions(captions).vector)


def test_without_a_pooling_options_and_weights_are_those_of_before():
    model = DualEncoder(vocab_size=30, width=8)
    assert set(model.options) == {"image", "text", "width", "heads"}
    assert not [name for name in model.state_dict() if "pooling" in name]


def test_the_mean_of_projected_parts_is_the_projected_mean():
    options = {**OPTIONS, "pooling": {"image": {"kind": "mean"}}}
    model, images = DualEncoder(vocab_size=30, **options).eval(), images_of(3)
    plain = DualEncoder(vocab_size=30, **{**options, "pooling": None}).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.encode_images(images).vector, plain.encode_images(images).vector)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"image": {"kind": "gpoo"}}, "unknown pooling 'gpoo'; did you mean 'gpo'"),
        ({"picture": {"kind": "gpo"}}, "sides image and text, not picture"),
        ({"text": {"hidden": 4}}, r"pooling\.text needs a kind: mean, gpo"),
        ({"text": {"kind": "gpo", "positions": 7}}, "positions is 7; sine and cosine need an even width"),
        ({"text": {"kind": "gpo", "hiden": 7}}, "did you mean 'hidden'"),
    ],
)
def test_a_pooling_that_cannot_be_is_refused(pooling, message):
    with pytest.raises(ValueError, match=message):
        DualEncoder(vocab_size=30, **{**OPTIONS, "pooling": pooling})
