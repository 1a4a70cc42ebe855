"""Joint SGRAF and SGRAF with parts taken out, beside sums and means written out for one pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from itm.losses.triplet import triplet_loss
from itm.matchers.late.sgraf import SAF, SGR, SGRAF
from itm.methods.cusa import CUSA
from itm.methods.matching import Matching
from itm.types import Batch, SoftLabels
from tests.support.late_worlds import SMALL, captions_of, encoded, images_of, padded

SIZES = {**SMALL, "sim_dim": 5, "regions": 4, "dropout": 0.0}
ROWS = [2, 7, 3, 5]


def small(model: Any, **options: Any) -> Any:
    matcher = model(**{**SIZES, **options}).double()
    for parameter in matcher.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return matcher


def apart(joint: SGRAF) -> tuple[SGR, SAF]:
    """The SGR and the SAF that the joint matcher holds, as matchers of their own."""
    weights = joint.state_dict()
    sgr, saf = SGR(**SIZES).double(), SAF(**SIZES).double()
    sgr.load_state_dict({name: weights[name].clone() for name in sgr.state_dict()})
    renamed = {name: name.replace("sim_eval_w", "saf_eval_w") for name in saf.state_dict()}
    saf.load_state_dict({name: weights[found].clone() for name, found in renamed.items()})
    return sgr.train(joint.training), saf.train(joint.training)


def batch() -> Batch:
    images = images_of(4, 4)
    labels = SoftLabels(torch.randn(4, 6).double(), torch.randn(4, 7).double())
    return Batch(images, captions_of(ROWS), labels)


def test_the_joint_score_is_the_mean_of_the_scores_of_its_sgr_and_its_saf_in_tiles_too():
    joint = small(SGRAF).eval()
    sgr, saf = apart(joint)
    left, right = encoded(joint, images_of(5, 4), captions_of([6, 2, 3, 1]))
    wanted = (sgr.score(left, right) + saf.score(left, right)) / 2
    assert wanted.std() > 1e-3
    torch.testing.assert_close(joint.score(left, right), wanted, atol=1e-12, rtol=0)
    with torch.no_grad():
        assert joint.cuts_tiles(right)
        torch.testing.assert_close(joint.score(left, padded(right, 2)), wanted, atol=1e-12, rtol=0)
    parts = joint.training_scores(left, right)
    torch.testing.assert_close(parts[0], sgr.score(left, right), atol=1e-12, rtol=0)


def test_joint_training_adds_the_losses_and_so_the_gradients_of_what_is_shared():
    joint, given = small(SGRAF).train(), batch()
    alone = apart(joint)
    losses = Matching(joint, loss="triplet", official=True)(given)
    losses["triplet"].backward()
    each = [Matching(matcher, loss="triplet", official=True)(given)["triplet"] for matcher in alone]
    torch.testing.assert_close(losses["triplet"], each[0] + each[1])
    torch.stack(each).sum().backward()
    own = [dict(matcher.named_parameters()) for matcher in alone]
    for name, parameter in joint.named_parameters():
        found = [weights[name].grad for weights in own if name in weights and name != "sim_eval_w.weight"]
        if len(found) == 2 and not name.startswith("sim_eval_w"):
            torch.testing.assert_close(parameter.grad, found[0] + found[1], atol=1e-10, rtol=1e-8)
        assert parameter.grad is not None, name
    torch.testing.assert_close(joint.saf_eval_w.weight.grad, own[1]["sim_eval_w.weight"].grad)
    torch.testing.assert_close(joint.SAF_module.bn.running_mean, alone[1].SAF_module.bn.running_mean)


def test_cusa_on_the_joint_matcher_ranks_both_scores_and_aligns_their_mean():
    joint, given = small(SGRAF).train(), batch()
    method = CUSA(joint, triplet={}, csa={"teacher": 1.0}, usa=False).double()
    losses = method(given)
    left, right = joint.encode_images(given.images), joint.encode_captions(given.captions)
    positives = torch.eye(4, dtype=torch.bool)
    both = joint.training_scores(left, right)
    torch.testing.assert_close(losses["triplet"], sum(triplet_loss(scores, positives) for scores in both))
    assert losses["csa"] > 0


def by_hand(matcher: Any, regions: Tensor, words: Tensor) -> Tensor:
    """The score of one pair: regions (R,D), words (L,D), node by node."""
    raw = F.leaky_relu(regions @ words.T, 0.1)
    raw = raw / (raw.square().sum(1, keepdim=True).sqrt() + 1e-8)
    nodes = []
    if matcher.kept_nodes != "local":
        whole = matcher.v_global_w(regions[None], torch.ones(1, len(regions)).bool())[0]
        said = matcher.t_global_w(words[None], torch.ones(1, len(words)).bool())[0]
        nodes.append(matcher.sim_tranglo_w((whole - said) ** 2))
    if matcher.kept_nodes != "global":
        for w in range(len(words)):
            attended = (9 * raw[:, w]).softmax(0) @ regions
            nodes.append(matcher.sim_tranloc_w((attended / (attended.norm() + 1e-8) - words[w]) ** 2))
    z = torch.stack([node / (node.norm() + 1e-8) for node in nodes])
    if matcher.readout == "mean":
        vector = z.mean(0)
    elif isinstance(matcher, SGR):
        for step in matcher.SGR_module:
            z = step.sim_graph_w((step.graph_query_w(z) @ step.graph_key_w(z).T).softmax(1) @ z).relu()
        vector = z.mean(0) if matcher.kept_nodes == "local" else z[0]
    else:
        module = matcher.SAF_module
        gate = module.bn(module.attn_sim_w(z)).sigmoid()[:, 0]
        vector = (gate / (gate.sum() + 1e-8)) @ z
        vector = vector / (vector.norm() + 1e-8)
    return matcher.sim_eval_w(vector).sigmoid()[0]


ABLATIONS = [{"nodes": "local"}, {"nodes": "global"}, {"readout": "mean"}, {"nodes": "local", "readout": "mean"}, {}]


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
@pytest.mark.parametrize("model", [SGR, SAF])
def test_a_score_without_some_nodes_or_without_reasoning_is_the_formula_over_the_nodes_that_are_left(model: Any, options: Any):
    matcher = small(model, **options).eval()
    left, right = encoded(matcher, images_of(3, 4), captions_of([6, 2, 3]))
    with torch.no_grad():
        scores = matcher.score(left, right)
        wanted = [[by_hand(matcher, i, c[m]) for c, m in zip(right.parts, right.mask, strict=True)] for i in left.parts]
        torch.testing.assert_close(scores, torch.tensor(wanted, dtype=torch.float64), atol=1e-10, rtol=0)
        torch.testing.assert_close(matcher.score(left, padded(right, 3)), scores, atol=1e-12, rtol=0)
    again = model(vocab_size=SIZES["vocab_size"], **matcher.options).double()
    again.load_state_dict(matcher.state_dict())
    assert set(options) == {"nodes", "readout"} & set(matcher.options)


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
@pytest.mark.parametrize("model", [SGR, SAF])
def test_what_is_taken_out_is_not_built_so_every_weight_learns(model: Any, options: Any):
    matcher = small(model, **options).train()
    sum(Matching(matcher, loss="triplet")(batch()).values()).backward()
    assert [name for name, parameter in matcher.named_parameters() if parameter.grad is None] == []
    assert any(name.startswith("v_global_w") for name in matcher.state_dict()) == (options.get("nodes") != "local")


def test_an_ablation_that_is_not_known_is_refused():
    for options, message in (({"nodes": "words"}, "nodes is all, local or global"), ({"readout": "max"}, "readout is reasoning or mean")):
        with pytest.raises(ValueError, match=message):
            SGR(**SIZES, **options)
