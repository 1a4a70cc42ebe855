"""UNITER and IAIS checkpoints: every key is consumed or named; sizes as published."""

from __future__ import annotations

import pytest
import torch

from itm.evaluation.metrics import retrieval_metrics
from itm.importers.load import recognise
from itm.importers.uniter import load_uniter
from itm.matchers.joint.uniter import UNITER

SMALL = {"vocab_size": 20, "hidden": 16, "layers": 2, "heads": 2, "intermediate": 24, "positions": 9, "region_dim": 6}


def fine_tuned() -> dict[str, torch.Tensor]:
    return {key: torch.randn_like(value) for key, value in UNITER(**SMALL).state_dict().items()}


def pre_trained() -> dict[str, torch.Tensor]:
    state = {key: value for key, value in fine_tuned().items() if not key.startswith("rank_output")}
    heads = {"cls.predictions.bias": (20,), "feat_regress.net.0.weight": (16, 16), "region_classifier.net.3.bias": (7,)}
    return {**state, **{key: torch.randn(shape) for key, shape in heads.items()}}


@pytest.mark.parametrize(
    ("sizes", "tensors", "parameters"),
    [({}, 214, 109_901_059), ({"hidden": 1024, "layers": 24, "heads": 16}, 406, 335_698_947)],
    ids=["base", "large"],
)
def test_the_published_sizes_have_the_published_number_of_tensors_and_parameters(sizes, tensors, parameters):
    with torch.device("meta"):
        state = UNITER(vocab_size=28996, **sizes).state_dict()
    assert (len(state), sum(v.numel() for v in state.values())) == (tensors, parameters)


def test_a_fine_tuned_file_is_read_whole_with_sizes_from_its_tensors():
    state = fine_tuned()
    matcher = load_uniter(state, heads=2)
    assert {k: matcher.options[k] for k in SMALL if k != "vocab_size"} == {k: v for k, v in SMALL.items() if k != "vocab_size"}
    assert matcher.dropped == []
    assert not matcher.training
    assert all(torch.equal(value, state[key]) for key, value in matcher.state_dict().items())


def test_a_pre_trained_file_gets_its_rank_head_from_the_match_row_and_names_what_was_dropped():
    state = pre_trained()
    matcher = load_uniter(state, heads=2)
    assert torch.equal(matcher.rank_output.weight, state["itm_output.weight"][1:2])
    assert torch.equal(matcher.rank_output.bias, state["itm_output.bias"][1:2])
    assert matcher.rank_output.weight.data_ptr() != matcher.itm_output.weight.data_ptr()
    assert matcher.dropped == ["cls.predictions.bias", "feat_regress.net.0.weight", "region_classifier.net.3.bias"]


def test_a_trained_rank_head_is_never_overwritten():
    state = fine_tuned()
    assert torch.equal(load_uniter(state, heads=2).rank_output.weight, state["rank_output.weight"])


def test_old_names_wrappers_and_half_precision_are_read():
    state = fine_tuned()
    old = {
        f"module.{k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')}": v.half()
        for k, v in state.items()
    }
    matcher = load_uniter(old, heads=2)
    assert matcher.rank_output.weight.dtype == torch.float32
    torch.testing.assert_close(matcher.state_dict(), {k: v.half().float() for k, v in state.items()})


def test_missing_and_unexpected_keys_are_named():
    state = fine_tuned()
    state["uniter.pooler.dense.weigth"] = state.pop("uniter.pooler.dense.weight")
    with pytest.raises(ValueError, match=r"missing uniter.pooler.dense.weight; unexpected uniter.pooler.dense.weigth"):
        load_uniter(state, heads=2)
    with pytest.raises(ValueError, match=r"missing uniter\.embeddings\.word_embeddings\.weight"):
        load_uniter({"img_embeddings.x": torch.zeros(1)}, heads=2)


def test_a_tensor_of_another_shape_is_named():
    state = fine_tuned()
    state["uniter.pooler.dense.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"uniter.pooler.dense.bias is \(3,\), expected \(16,\)"):
        load_uniter(state, heads=2)


def test_another_vocabulary_and_an_unknown_number_of_heads_are_refused():
    with pytest.raises(ValueError, match=r"embeds 20 word pieces, the tokenizer has 21"):
        load_uniter(fine_tuned(), heads=2, vocab_size=21)
    with pytest.raises(ValueError, match="give heads="):
        load_uniter(fine_tuned())


def test_the_family_is_told_from_the_keys():
    assert recognise(fine_tuned()) == "uniter"
    assert recognise({"logit_scale": torch.ones(()), "visual.proj": torch.ones(2, 2)}) == "clip"


def test_printed_recalls_add_the_row_number_error():
    """12 captions of 12 images, each ranking its own image 6th: the true R@1 and R@5 are 0."""
    n = 12
    scores = torch.zeros(n, n)
    for caption in range(n):
        for place in range(n):
            scores[(caption + place) % n, caption] = 6.5 if place == 0 else float(n - place)
    got = retrieval_metrics(scores, (torch.arange(n), torch.arange(n)), tie="official_iais")
    assert got["t2i_r1"] == pytest.approx(100 / n)
    assert got["t2i_r5"] == pytest.approx(500 / n)
    assert got["t2i_r10"] == pytest.approx(100 * (n + 10) / n)
