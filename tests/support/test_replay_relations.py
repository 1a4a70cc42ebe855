"""Relation-block folders that the stored golden ones do not cover: peaky attention, several pairs with entities, pairs of one word.

The reference is the loop over pairs of docs/methods/iais.md#relation-distance and
docs/methods/iais.md#alignment-losses, in float64; the replay of `make golden` must accept its numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.replay.iais import find

BLOCKS = ("LL", "VV", "LV", "VL")


def divergence(a: Tensor, b: Tensor, eps: float) -> Tensor:
    total = a.new_zeros(())
    for x, y in zip(a.flatten(), b.flatten(), strict=True):
        total = total + y * y.log() - y * (x + eps).log() + x * x.log() - x * (y + eps).log()
    return total / len(a)


def pair_value(name: str, ll: Tensor, vv: Tensor, lv: Tensor, vl: Tensor) -> Tensor:
    own, other, across, back = (ll, vv, lv, vl) if name[0] == "L" else (vv, ll, vl, lv)
    if name.endswith("distributed"):
        return divergence(own, across @ back, 1e-6)
    index = across.argmax(1)
    return divergence(own, other[index][:, index].softmax(1), 0.0)


def relation(attention: Tensor, sets: Tensor) -> Tensor:
    found = torch.stack([torch.stack([attention[k > 0][:, o > 0].sum(1).mean() for o in sets]) for k in sets]).clamp(min=1e-12)
    return found / found.sum(1, keepdim=True)


def write_case(folder: Path, sizes: list[tuple[int, int]], scale: float, entities: int) -> None:
    torch.manual_seed(len(sizes))
    groups, n, m = len(sizes), max(a for a, _ in sizes), max(b for _, b in sizes)
    shapes = {"LL": (n, n), "VV": (m, m), "LV": (n, m), "VL": (m, n)}
    blocks = {key: torch.zeros(groups, *shape, dtype=torch.float64) for key, shape in shapes.items()}
    lengths = {"L": [a for a, _ in sizes], "V": [b for _, b in sizes]}
    for g in range(groups):
        for key in BLOCKS:
            rows, columns = lengths[key[0]][g], lengths[key[1]][g]
            blocks[key][g, :rows, :columns] = (scale * torch.randn(4, rows, columns).double()).softmax(-1).mean(0)
    arrays = {f"attn_{key}": block.numpy().copy() for key, block in blocks.items()}
    arrays |= {"n_words": np.array(lengths["L"]), "n_regions": np.array(lengths["V"])}
    for name in ("L_singular", "V_singular", "L_distributed", "V_distributed"):
        leaves = {key: block.clone().requires_grad_() for key, block in blocks.items()}
        cut = [[leaves[k][g, : lengths[k[0]][g], : lengths[k[1]][g]] for k in BLOCKS] for g in range(groups)]
        values = torch.stack([pair_value(name, *each) for each in cut])
        values.mean().backward()
        arrays |= {f"loss_{name}": values.mean().detach().numpy(), f"pair_{name}": values.detach().numpy()}
        arrays |= {f"gmap_{name}__{key}": (torch.zeros_like(v) if v.grad is None else v.grad).numpy() for key, v in leaves.items()}
    if entities:
        counts = [entities - g % 2 for g in range(groups)]
        words, regions = np.zeros((groups, entities, n), np.int64), np.zeros((groups, entities, m), np.int64)
        sums, whole = np.zeros(groups), {side: np.zeros((groups, entities, entities)) for side in "LV"}
        for g, count in enumerate(counts):
            for k in range(count):
                words[g, k, [k % sizes[g][0], (k + 1) % sizes[g][0]]] = 1
                regions[g, k, [k % sizes[g][1], (3 * k) % sizes[g][1]]] = 1
            a = relation(blocks["LL"][g], torch.from_numpy(words[g, :count]))
            b = relation(blocks["VV"][g], torch.from_numpy(regions[g, :count]))
            sums[g] = float(((a - b) * (a.log() - b.log())).sum())
            whole["L"][g, :count, :count], whole["V"][g, :count, :count] = a, b
        arrays |= {"entity_tok": words, "entity_reg": regions, "isda_sum": sums, "isda_mean": sums / counts}
        arrays |= {f"isda_A_{side}": value for side, value in whole.items()}
    folder.mkdir()
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    (folder / "README.json").write_text(
        json.dumps({"config": {}, "arrays": {name: {"shape": list(v.shape)} for name, v in arrays.items()}})
    )


@pytest.mark.parametrize(
    ("sizes", "scale", "entities"),
    [([(5, 7), (9, 4), (6, 6)], 6.0, 3), ([(1, 6), (3, 1), (1, 1), (12, 10)], 2.0, 0), ([(8, 8)], 12.0, 4)],
    ids=["peaky with entities", "one word or region", "almost one-hot"],
)
def test_relation_blocks_of_any_shape_replay(tmp_path: Path, sizes: list[tuple[int, int]], scale: float, entities: int):
    write_case(tmp_path / "case", sizes, scale, entities)
    (case,) = find(tmp_path)
    checks = list(case.run())
    assert {check.name: check.differences()[:2] for check in checks if not check.differences()[2]} == {}
    assert len(checks) >= 28
