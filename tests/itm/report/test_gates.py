"""Gates of SAF and edges of SGR against the formulas of the paper, node by node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from itm.report.pair import explained, find_pair
from itm.types import Matcher
from tests.support.pair_world import matcher_of, split

CPU = torch.device("cpu")


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum().sqrt() + 1e-8)


def world(folder: Path, kind: str) -> tuple[Any, dict[str, Any], list[Tensor]]:
    """The matcher, what is told of a pair, and the similarity vectors of its nodes."""
    rows = split(folder / "test")
    matcher: Any = matcher_of(kind, rows)
    for norm in (module for module in matcher.modules() if isinstance(module, torch.nn.BatchNorm1d)):
        torch.nn.init.uniform_(norm.running_mean, -0.3, 0.3)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    pair = find_pair(str(folder / "test"), rows[3].key)
    told = explained(matcher, pair, CPU)
    with torch.no_grad():
        images, captions = matcher.inputs.images([pair.image.regions]), matcher.inputs.captions([pair.caption.text])
        image, caption = matcher.encode_images(images), matcher.encode_captions(captions)
        return matcher, told, nodes(matcher, image, caption)


def nodes(matcher: Any, image: Any, caption: Any) -> list[Tensor]:
    """z_0 of the whole pair, z_1 to z_L of the words, in loops (docs/methods/sgraf.md#similarity-vectors)."""
    regions = [r for r, real in zip(image.parts[0], image.mask[0], strict=True) if real]
    words = [w for w, real in zip(caption.parts[0], caption.mask[0], strict=True) if real]
    seen = [[torch.nn.functional.leaky_relu(r @ w, 0.1) for w in words] for r in regions]
    normed = [[a / (sum(b**2 for b in row) ** 0.5 + 1e-8) for a in row] for row in seen]
    whole = (matcher.whole(image, "image") - matcher.whole(caption, "text"))[0]
    found = [unit(matcher.sim_tranglo_w(whole**2))]
    for place, word in enumerate(words):
        shares = torch.stack([9.0 * row[place] for row in normed]).softmax(0)
        attended = unit(sum(share * region for share, region in zip(shares, regions, strict=True)))
        found.append(unit(matcher.sim_tranloc_w((attended - word) ** 2)))
    return found


@torch.no_grad()
def test_gates_are_the_share_of_each_node_by_the_formula_of_saf(tmp_path: Path):
    matcher, told, z = world(tmp_path, "saf")
    module, norm = matcher.SAF_module, matcher.SAF_module.bn
    opened = [
        torch.sigmoid(((module.attn_sim_w(node) - norm.running_mean) / (norm.running_var + norm.eps) ** 0.5) * norm.weight + norm.bias)
        for node in z
    ]
    total = sum(opened) + 1e-8
    assert told["gates"]["gates"] == pytest.approx([float(gate / total) for gate in opened], abs=2e-6)
    score = torch.sigmoid(matcher.sim_eval_w(unit(sum(gate / total * node for gate, node in zip(opened, z, strict=True)))))
    assert told["score"] == pytest.approx(float(score), abs=1e-6)
    assert told["gates"]["nodes"][:2] == ["whole pair", "start"] and told["gates"]["nodes"][-1] == "end"
    assert len(told["gates"]["nodes"]) == len(z)


@torch.no_grad()
def test_edges_of_each_step_are_the_softmax_of_queries_and_keys_and_lead_to_the_score(tmp_path: Path):
    matcher, told, z = world(tmp_path, "sgr")
    steps = [torch.tensor(step) for step in told["edges"]["steps"]]
    assert [step.shape for step in steps] == [(len(z), len(z)), (len(z), len(z)), (1, len(z))]
    by_hand = []
    for module, told_step in zip(matcher.SGR_module, steps, strict=True):
        rows = []
        for asking in z:
            logits = [float(module.graph_query_w(asking) @ module.graph_key_w(node)) for node in z]
            rows.append(torch.tensor(logits).softmax(0))
        torch.testing.assert_close(told_step, torch.stack(rows)[: len(told_step)], atol=3e-6, rtol=0)
        by_hand.append(torch.stack(rows))
        z = [module.sim_graph_w(sum(share * node for share, node in zip(row, z, strict=True))).relu() for row in rows]
    assert told["score"] == pytest.approx(float(torch.sigmoid(matcher.sim_eval_w(z[0]))), abs=1e-6)
    share = (by_hand[2] @ by_hand[1] @ by_hand[0])[0]
    torch.testing.assert_close(torch.tensor(told["edges"]["share"]), share, atol=3e-6, rtol=0)


def test_joint_sgraf_shows_both_and_an_ablated_saf_says_what_it_was_made_with(tmp_path: Path):
    rows = split(tmp_path / "test")
    pair = find_pair(str(tmp_path / "test"), rows[3].key)
    told = explained(matcher_of("sgraf", rows), pair, CPU)
    assert sum(told["gates"]["gates"]) == pytest.approx(1, abs=1e-4) and len(told["edges"]["steps"]) == 3
    assert [sum(row) for step in told["edges"]["steps"] for row in step] == pytest.approx(
        [1] * (2 * len(told["edges"]["nodes"]) + 1), abs=1e-4
    )
    lacks = explained(matcher_of("saf", rows, nodes="local"), pair, CPU)["lacks"]
    assert "gates of the words: this saf was made with nodes=local and readout=reasoning, an ablation" in lacks


def test_a_matcher_without_gates_or_graph_says_which_kind_has_them(tmp_path: Path):
    rows = split(tmp_path / "test")
    scan: Matcher = matcher_of("scan", rows)
    lacks = explained(scan, find_pair(str(tmp_path / "test"), rows[0].key), CPU)["lacks"]
    assert "gates of the words: scan has no gates: saf and sgraf have them" in lacks
    assert "edges of the reasoning steps: scan reasons over no graph: sgr and sgraf do" in lacks
