"""Every matcher under every method takes its steps on a CUDA device, with the numbers of the CPU and few waits."""

from __future__ import annotations

import functools
from typing import Any

from tests.support.pretend import pretend  # before torch
import pytest
import torch
from torch import Tensor

from itm.config import Train
from itm.kinds import build_part
from itm.methods import METHODS
from itm.training.cached import check_cached
from itm.training.switches import build_step
from tests.support.every_matcher import KINDS, batch_of, matcher_of

OPTIONS: dict[str, dict[str, Any]] = {"matching": {"loss": "triplet"}, "cusa": {}, "iais": {"ranking": {"hard_negatives": 2}}}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"clip_norm": 1.0},
    "ema": {"ema": 0.9},
    "accumulate": {"accumulate": 2},
    "cache_chunk": {"cache_chunk": 2},
    "checkpoint_activations": {"checkpoint_activations": True},
}
WORDS = {"word_dim": 6, "width": 10, "dropout": 0.4}
GIVEN: dict[str, dict[str, Any]] = {
    "vse": {"text": {"kind": "gru", **WORDS}},
    "scan": {"text": WORDS},
    "scan_i2t": {"text": WORDS},
    "sgr": {"text": WORDS, "dropout": 0.4},
    "saf": {"text": WORDS, "dropout": 0.4},
    "uarda": {"text": WORDS},
    "uniter": {"dropout": 0.3},
}
WAITS = {
    "matching": {"vse": 7, "dual": 7, "clip": 6, "scan": 11, "scan_i2t": 11, "sgr": 15, "saf": 15, "uarda": 27, "uniter": 6},
    "cusa": {"vse": 8, "dual": 8, "clip": 7, "scan": 12, "scan_i2t": 12, "sgr": 16, "saf": 16, "uarda": 28, "uniter": 7},
    "iais": {"vse": 23, "scan": 27, "scan_i2t": 27, "sgr": 31, "saf": 31, "uarda": 43, "uniter": 27},
}
"""Of one batch, its copy included: a ratchet, to be lowered with each wait that goes. Chunks and second passes may ask once more each."""
TIMES = {"accumulate": 2, "cache_chunk": 6, "checkpoint_activations": 2}


def refusal(name: str, kind: str, settings: str) -> str | None:
    """What the product says instead of training, None where it trains."""
    if kind == "iais" and name in ("dual", "clip"):
        return "parts and vector have one width" if name == "dual" else "clip"
    if settings == "cache_chunk" and name == "uniter":
        return "joint encoder for every pair"
    if settings == "cache_chunk" and name == "dual":
        return "batch norm"
    return None


def most_waits(name: str, kind: str, settings: str) -> int:
    return WAITS[kind][name] * TIMES.get(settings, 1)


def step_batches(settings: str) -> int:
    return 2 if settings == "accumulate" else 1


def method_of(name: str, kind: str) -> Any:
    torch.manual_seed(3)
    return build_part(METHODS, kind, OPTIONS[kind], "method", matcher=matcher_of(name, **GIVEN.get(name, {}))).train()


def gradients(device: str, name: str, kind: str, settings: str, precision: str) -> tuple[dict[str, float], dict[str, Tensor], Any]:
    """Losses and gradients of a step, and what was seen in it."""
    method, batch = method_of(name, kind), batch_of(6)
    if settings == "cache_chunk":
        check_cached(method.matcher, batch.images[:2], batch.captions[:2])
    train = Train(lr=1e-3, schedule="constant", precision=precision, **SETTINGS[settings])
    step = build_step(method, train, lambda _: 1e-3, 7, torch.device(device))
    torch.manual_seed(1)
    with pretend.watch() as seen:
        losses = step([batch] * train.accumulate, 0)
    found = {n: p.grad.detach().cpu() for n, p in step.plain.named_parameters() if p.grad is not None}
    return {n: float(v) for n, v in losses.items()}, found, seen


@functools.cache
def on_the_cpu(name: str, kind: str, settings: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    return gradients("cpu", name, kind, settings, "fp32")[:2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", KINDS)
def test_a_step_on_the_device_is_that_of_the_cpu(name: str, kind: str, settings: str, precision: str) -> None:
    if said := refusal(name, kind, settings):
        with pytest.raises(ValueError, match=said):
            gradients("cpu", name, kind, settings, precision)
        return
    losses, want = on_the_cpu(name, kind, settings)
    with pretend.cuda():
        found, got, seen = gradients("cuda", name, kind, settings, precision)
    assert got.keys() == want.keys()
    if precision == "fp32":
        assert found == pytest.approx(losses, rel=1e-4, abs=1e-5)
        top = max(float(w.abs().max()) for w in want.values())
        for n, w in want.items():
            assert float((got[n] - w).abs().max()) < 1e-3 * top, n
    else:
        flat = [torch.cat([g[n].flatten() for n in want]) for g in (want, got)]
        assert found["loss"] == pytest.approx(losses["loss"], rel=0.03)
        assert float(torch.cosine_similarity(*flat, dim=0)) > 0.9
    assert seen.waits <= most_waits(name, kind, settings), seen.table()
    assert all(event.where.startswith("itm/matchers/") for event in seen.of("h2d")), "the batch itself comes out of pinned memory"
    assert len(seen.of("h2d-async")) == step_batches(settings), seen.table("h2d-async")
    assert not pretend.without_cuda_kernel(seen.operators)
