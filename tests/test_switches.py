"""train.checkpoint_activations: the numbers of a run without it, for less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itm.methods.iais import IAIS
from itm.methods.matching import Matching
from itm.training.cached import encoding_in_chunks
from itm.training.optim import moving_average
from itm.training.recompute import recompute_activations
from tests.every_matcher import TOWER, batch_of, matcher_of

LAYERS = {**TOWER, "num_hidden_layers": 3, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.0}
HF_IMAGE = {"kind": "hf_vision", "config": {"model_type": "vit", "image_size": 16, "patch_size": 4, **LAYERS}}
HF_TEXT = {"kind": "hf_text", "config": {"model_type": "bert", "max_position_embeddings": 12, **LAYERS}}
RESNET = {"kind": "hf_vision", "config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}}
ROWS = 6


def hf(**towers: Any) -> Any:
    return matcher_of("dual", image=HF_IMAGE, text=HF_TEXT, heads=None) if not towers else matcher_of("dual", heads=None, **towers)


MATCHERS: dict[str, Any] = {
    "hf": hf,
    "resnet": lambda: hf(image=RESNET, text=HF_TEXT),
    **{name: lambda name=name: matcher_of(name) for name in ("dual", "clip", "saf", "sgr", "uarda", "uniter")},
}


def method_of(name: str) -> nn.Module:
    torch.manual_seed(2)
    if name == "iais":
        return IAIS(matcher_of("uniter"), ranking={"hard_negatives": 2}).double().train()
    return Matching(MATCHERS[name](), loss="triplet", margin=0.5).double().train()


def one_step(method: nn.Module, chunk: int | None = None) -> dict[str, Tensor]:
    """Gradients after a forward and backward pass, and the buffers it leaves."""
    torch.manual_seed(4)
    with encoding_in_chunks(method.matcher, chunk):
        losses = method(batch_of(ROWS))
    torch.stack(list(losses.values())).sum().backward()
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return found | {name: buffer.double() for name, buffer in method.named_buffers()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def bytes_saved(method: nn.Module) -> int:
    """What autograd keeps for the backward pass, apart from parameters."""
    sizes: dict[int, int] = {p.data_ptr(): 0 for p in method.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t):
        method(batch_of(ROWS))
    return sum(sizes.values())


@pytest.mark.parametrize("name", [*MATCHERS, "iais"])
def test_recomputed_activations_change_no_gradient_no_dropout_no_statistic_and_save_memory(name: str) -> None:
    plain, saving = method_of(name), method_of(name)
    recompute_activations(saving.matcher)
    wanted = one_step(copy.deepcopy(plain))
    assert_equal(one_step(copy.deepcopy(saving)), wanted)
    assert max(float(v.abs().max()) for v in wanted.values()) > 1e-3
    assert bytes_saved(saving) < 0.8 * bytes_saved(plain)


def test_recomputation_inside_chunks_and_in_a_moving_average() -> None:
    method = method_of("hf")
    wanted = one_step(copy.deepcopy(method), chunk=4)
    recompute_activations(method.matcher)
    average = moving_average(method, 0.9)
    assert_equal(one_step(method, chunk=4), wanted)
    assert_equal(one_step(average.module, chunk=4), wanted)
