"""Cached batches: gradients of the big batch from chunks, dropout replayed, and a reason where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from itm.config import Train
from itm.matchers.dual import DualEncoder
from itm.matchers.encoders.build import Encoder
from itm.matchers.late.scan import SCAN
from itm.matchers.late.sgraf import SGR
from itm.methods.cusa import CUSA
from itm.methods.iais import IAIS
from itm.methods.matching import Matching
from itm.training.cached import check_cached
from itm.training.optim import build_optimizer
from itm.training.step import Step
from itm.types import Batch, Captions, Images, Matcher, SoftLabels
from pipelines.train import train
from tests.support.small_training import final, recipe, same, splits

ROWS = 11
TEXT = {"kind": "pooled_gru", "word_dim": 6, "hidden": 8}


def batch() -> Batch:
    """Eleven rows, no multiple of a chunk; two of one image; captions of different lengths."""
    torch.manual_seed(1)
    ids = torch.arange(ROWS).remainder(9)
    lengths = torch.arange(ROWS).remainder(4) + 2
    mask = torch.arange(5) < lengths[:, None]
    regions = Images(ids, regions=torch.randn(ROWS, 3, 10), mask=torch.ones(ROWS, 3, dtype=torch.bool))
    return Batch(
        regions, Captions(torch.randint(4, 20, (ROWS, 5)) * mask, mask, ids), SoftLabels(torch.randn(ROWS, 7), torch.randn(ROWS, 9))
    )


def dual(**heads: bool) -> DualEncoder:
    return DualEncoder(vocab_size=20, image={"kind": "regions", "in_width": 10, "width": 8}, text=TEXT, width=8, heads=heads)


def scan() -> SCAN:
    return SCAN(vocab_size=20, image={"kind": "regions", "in_width": 10, "width": 8}, text={"kind": "gru", "word_dim": 6, "width": 8})


def gradients(method: nn.Module, chunk: int | None, seed: int = 3) -> dict[str, torch.Tensor]:
    method.zero_grad()
    rows = batch()
    torch.manual_seed(seed)
    losses = method(rows, chunk=chunk)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


METHODS: dict[str, Any] = {
    "contrastive": lambda: Matching(dual()),
    "triplet, hardest": lambda: Matching(dual(), loss="triplet", hardest=True),
    "csa and usa": lambda: CUSA(dual(uni=True)),
    "csa and usa, own heads": lambda: CUSA(scan(), itc=False, triplet={"hardest": True}),
    "late interaction": lambda: Matching(scan(), loss="triplet", hardest=True),
    "relations of late interaction": lambda: IAIS(scan(), schedule="constant"),
    "relations of a dual encoder": lambda: IAIS(dual(), schedule="constant"),
}


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_equal_those_of_the_big_batch(name: str, chunk: int) -> None:
    method = METHODS[name]().double()
    whole, cached = gradients(method, None), gradients(method, chunk)
    assert whole.keys() == cached.keys()
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3
    for parameter, gradient in whole.items():
        torch.testing.assert_close(cached[parameter], gradient, rtol=1e-6, atol=1e-9, msg=lambda m, p=parameter: f"{p}: {m}")


class Noisy(Encoder):
    """An image encoder with dropout that counts its calls and the rows of each."""

    width = vector_width = 10

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.linear, self.dropout, self.rows = nn.Linear(10, 10), nn.Dropout(drop), []

    def forward(self, images: Images) -> Any:
        self.rows.append(len(images))
        return type("E", (), {"vector": self.dropout(self.linear(images.regions.mean(1))), "parts": None, "mask": None})()


def test_dropout_is_replayed_in_the_second_pass() -> None:
    """The same chunks with their activations kept (plain autograd) are the reference; without the replay the gradients would differ."""
    method = Matching(dual())
    noisy = method.matcher.image_encoder = Noisy(0.5)
    method.matcher.image_linear = nn.Linear(10, 8)
    cached = gradients(method, 4)
    assert noisy.rows == [4, 4, 3, 3, 4, 4], "each chunk is encoded twice, never more than one at a time"
    from itm.matchers import chunked as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "checkpoint", lambda encode, *rows, use_reentrant: encode(*rows))
        kept = gradients(method, 4)
    for name, gradient in kept.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-6, atol=1e-7)
    other = gradients(method, 4, seed=4)
    assert any(not torch.allclose(other[name], gradient) for name, gradient in kept.items()), "dropout is on"


def test_activations_are_not_kept() -> None:
    """Bytes that autograd holds after the forward pass, apart from parameters."""
    method = Matching(DualEncoder(vocab_size=20, image={"kind": "regions", "in_width": 10, "width": 256}, text=TEXT, width=8))

    def held(chunk: int | None) -> int:
        sizes: dict[int, int] = {}
        keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t)
        with keeping:
            method(batch(), chunk=chunk)
        own = {p.data_ptr() for p in method.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    assert held(4) < held(None) / 5


def test_batch_norm_in_an_encoder_and_single_stream_models_are_refused_with_the_reason() -> None:
    b = batch()
    pixels = Images(torch.zeros(2, dtype=torch.int64), pixels=torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"encoders of matcher 'dual' use batch norm \(image_encoder\..*\), whose statistics"):
        check_cached(DualEncoder(vocab_size=20, text=TEXT), pixels, b.captions[:2])
    sgr = SGR(
        vocab_size=20, image={"kind": "regions", "in_width": 10, "width": 8}, text={"kind": "gru", "word_dim": 6, "width": 8}, regions=3
    )
    check_cached(sgr.train(), b.images[:2], b.captions[:2])  # its batch norm is in the score, which sees the whole batch
    assert sgr.training

    class Joint(Matcher):
        kind = "mine"
        joint = True

    with pytest.raises(ValueError, match=r"'mine' runs its joint encoder for every pair.*train\.accumulate"):
        check_cached(Joint(), b.images[:2], b.captions[:2])


def test_a_step_with_chunks_takes_the_same_step() -> None:
    taken = {}
    for chunk in (None, 4):
        torch.manual_seed(0)
        method, options = Matching(dual()), Train(batch_size=ROWS, optimizer="adamw", lr=0.01, cache_chunk=chunk)
        Step(method, build_optimizer(method, options), options, lambda step: 0.01, None, seed=0)([batch()], 0)
        taken[chunk] = {name: p.detach().clone() for name, p in method.named_parameters()}
    for name, weights in taken[None].items():
        torch.testing.assert_close(taken[4][name], weights, rtol=1e-5, atol=1e-6)


@pytest.mark.e2e
def test_a_recipe_with_chunks_is_refused_or_trains_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.small_training import die_at

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    splits(tmp_path, regions=True)
    with pytest.raises(ValueError, match=r"train\.cache_chunk: the encoders of matcher 'dual' use batch norm"):
        train(recipe(tmp_path, cache_chunk=2))
    model = {"kind": "dual", "options": {"image": {"kind": "regions", "in_width": 3, "width": 8}, "text": TEXT, "width": 8}}
    chunked = {"data": {"image": "regions", "val_split": ""}, "cache_chunk": 4}
    whole, killed = (
        recipe(tmp_path, name=name, **chunked).model_copy(update={"model": type(recipe(tmp_path).model)(**model)}) for name in "ab"
    )
    train(whole)
    with monkeypatch.context() as patch:
        die_at(7, patch)
        with pytest.raises(KeyboardInterrupt):
            train(killed)
    train(killed)
    assert same(final(tmp_path, "a"), final(tmp_path, "b"))
