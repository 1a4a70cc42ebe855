"""Activations that are made again are those of the first pass: gradients with dropout are those of the plain step, on the device."""

from __future__ import annotations

from typing import Any

from tests.support.pretend import pretend  # before torch
import pytest
import torch
from torch import Tensor

from itm.config import Train
from itm.kinds import build_part
from itm.matchers import MATCHERS
from itm.methods import METHODS
from itm.matchers import chunked
from itm.training.switches import build_step
from tests.support.every_matcher import CLIP_TOWERS, POSITIONS, SCAN_TOWERS, TOWER, WORDS as VOCABULARY, batch_of, matcher_of

WORDS = {"word_dim": 6, "width": 10, "dropout": 0.4}
DROPS = {"attention_probs_dropout_prob": 0.4, "hidden_dropout_prob": 0.4}
VIT = {"kind": "hf_vision", "config": {"model_type": "vit", **TOWER, **DROPS, "image_size": 16, "patch_size": 8}}
BERT = {
    "kind": "hf_text",
    "config": {"model_type": "bert", **TOWER, **DROPS, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS},
}
HALF = {"attention_dropout": 0.4}
CLIP = CLIP_TOWERS | {name: CLIP_TOWERS[name] | HALF for name in ("text_config", "vision_config")}  # type: ignore[operator]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("dual", {"image": VIT, "text": {"kind": "gru", **WORDS}, "width": 8}),
    "bert": ("dual", {"image": {"kind": "regions", **SCAN_TOWERS["image"]}, "text": BERT, "width": 8}),
    "vit and bert, late": ("scan", {"image": VIT, "text": BERT}),
    "clip": ("clip", {"config": CLIP}),
}


def matcher_named(name: str) -> Any:
    if name in MODELS:
        return build_part(MATCHERS, MODELS[name][0], MODELS[name][1], "model", vocab_size=VOCABULARY)
    given = {"text": WORDS} if name != "uniter" else {}
    return matcher_of(name, **given, dropout=0.4)


def gradient(name: str, **settings: Any) -> Tensor:
    torch.manual_seed(3)
    method = build_part(METHODS, "matching", {"loss": "triplet"}, "method", matcher=matcher_named(name)).train()
    step = build_step(method, Train(lr=1e-3, schedule="constant", **settings), lambda _: 1e-3, 7, torch.device("cuda"))
    torch.manual_seed(1)
    step([batch_of(6)], 0)
    return torch.cat([p.grad.detach().cpu().flatten() for p in step.plain.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", [*MODELS, "sgr", "saf", "uniter"])
def test_recomputed_activations_have_the_gradient_of_the_plain_step(name: str) -> None:
    with pretend.cuda():
        plain, again = gradient(name), gradient(name, checkpoint_activations=True)
        other = gradient(name)
    assert torch.equal(plain, other), "a step is a function of its number"
    assert float(torch.cosine_similarity(plain, again, dim=0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", [*MODELS, "sgr", "saf"])
def test_chunks_that_are_encoded_again_have_the_gradient_of_chunks_that_are_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend.cuda():
        again = gradient(name, cache_chunk=2)
        monkeypatch.setattr(chunked, "checkpoint", lambda run, *rows, **_: run(*rows))
        kept = gradient(name, cache_chunk=2)
    assert float(torch.cosine_similarity(kept, again, dim=0)) == pytest.approx(1, abs=1e-5)


def test_a_generator_that_is_not_put_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two tests above would say: the rows hidden from `checkpoint`, as they were before."""
    monkeypatch.setattr(
        chunked, "seen_by_checkpoint", lambda run, *given, **options: chunked.checkpoint(run, *given, use_reentrant=False, **options)
    )
    with pretend.cuda():
        again = gradient("vit", cache_chunk=2)
        monkeypatch.setattr(chunked, "checkpoint", lambda run, *rows, **_: run(*rows))
        kept = gradient("vit", cache_chunk=2)
    assert float(torch.cosine_similarity(kept, again, dim=0)) < 0.95
